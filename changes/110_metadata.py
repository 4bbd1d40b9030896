# SPDX-License-Identifier: Apache-2.0
"""`.metadata` and the common state of a checkpoint are read without torch."""

from fork.change import Change


change = Change(
    name="metadata",
    message="""\
feat(ckpt): read .metadata and the common state without torch

List the classes that PyTorch's DCP puts into .metadata, and those that
Megatron-LM puts into the common state, and read both by inert stand-ins.
""",
    why="The metadata of a checkpoint is read without torch, and runs no code.",
    modules=["release_checkpoint/metadata.py"],
    stands_on=["pickles"],
    problem="To know what a checkpoint holds one has to load it with torch, which unpickles `.metadata` without "
    "restriction.",
    changes=["A new module, `megatron.bridge.release_checkpoint.metadata`, which nothing uses yet."],
    unchanged=["Nothing else: no reader is touched."],
    tested=["Metadata and common states that PyTorch and Megatron Core 0.12 to 0.19 write are read."],
    later=["The next change lets the readers check `.metadata` first."],
    tests={"tests/unit/bridge/release_checkpoint/test_metadata.py": "release_checkpoint/"},
)
