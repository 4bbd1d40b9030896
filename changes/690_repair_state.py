# SPDX-License-Identifier: Apache-2.0
"""A repair gives the common state what that of a release has."""

from fork.change import Change


change = Change(
    name="repair-state",
    message="""\
feat(ckpt): repair the common state of a checkpoint

Write Megatron-LM's args, from run_config.yaml or a Hugging Face model, into
both forms of the common state.
""",
    why="The common state of a checkpoint is repaired in place.",
    modules=["repair/state.py"],
    stands_on=["repair-choice", "release-checkpoints", "common-state"],
    problem="A checkpoint that `import_ckpt` wrote before has no args, and Megatron-LM stops with `KeyError: 'args'`.",
    changes=["A new module, `megatron.bridge.repair.state`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests in which one form, the other, or both lack something."],
    tests={"tests/unit/bridge/release_checkpoint/test_repair_state.py": "release_checkpoint/"},
)
