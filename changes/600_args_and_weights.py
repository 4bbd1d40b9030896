# SPDX-License-Identifier: Apache-2.0
"""What the shapes of the weights say about the args."""

from fork.change import Change


change = Change(
    name="args-and-weights",
    message="""\
feat(ckpt): compare the args of a checkpoint with its weights

The args of a checkpoint may be those of another model than its weights.

Compare them by the shapes in .metadata, without torch.
""",
    why="The args of a checkpoint are compared with its weights.",
    modules=["release_checkpoint/weights.py"],
    stands_on=["metadata"],
    problem="Args of another model than the weights are found only when Megatron-LM stops with a shape mismatch, after it has built the model.",
    changes=["A new module, `megatron.bridge.release_checkpoint.weights`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests on the layouts of dense, MoE and MLA models."],
    later=["The next changes examine a whole checkpoint."],
    tests={"tests/unit/bridge/release_checkpoint/test_weights.py": "release_checkpoint/"},
)
