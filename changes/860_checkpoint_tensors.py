# SPDX-License-Identifier: Apache-2.0
"""The tensors of a distributed checkpoint are pieces of its files."""

from fork.change import Change


change = Change(
    name="checkpoint-tensors",
    message="""\
perf(ckpt): load a distributed checkpoint as pieces of its files

A load strategy of Megatron Core's that reads no values. PyTorch's DCP says
which parts of which chunks make a part of a tensor, however many ranks saved
it, and `torch.load` on the meta device says where the values of a chunk are.
""",
    why="A checkpoint can be loaded without reading a value.",
    modules=["models/conversion/streaming/checkpoint.py"],
    problem=(
        "`AutoBridge.export_ckpt` holds the whole model in memory, more than once: 11 GB for a model of 3B. This is the first "
        "of three changes that make an export read, convert and write in blocks. It finds the bytes of each tensor in "
        "the files of a checkpoint."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: later changes use it."],
    tested=["Tensors that one rank or several have saved, cut along each axis, with padding, and damaged files."],
    tests={"tests/unit/bridge/test_streaming_checkpoint.py": "models/"},
    stands_on=["import-plan", "in-process-save"],
)
