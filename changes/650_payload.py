# SPDX-License-Identifier: Apache-2.0
"""What a payload folder holds, by its metadata."""

from fork.change import Change


change = Change(
    name="payload-facts",
    message="""\
feat(ckpt): examine a payload folder by its metadata

Say its format, the Megatron Core that wrote it, its args and what is
missing or damaged, without torch and without reading a weight.
""",
    why="A payload folder is examined by its metadata alone.",
    modules=["release_checkpoint/payload.py"],
    stands_on=["args-and-weights", "common-state-forms", "other-formats"],
    problem="Whether a checkpoint is complete is only known after it was loaded, with a GPU and a model in memory.",
    changes=["A new module, `megatron.bridge.release_checkpoint.payload`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=[
        "Unit tests on small checkpoints that PyTorch wrote: whole, cut short, without a file, from core 0.18 and 0.19."
    ],
    tests={"tests/unit/bridge/release_checkpoint/test_payload.py": "release_checkpoint/"},
)
