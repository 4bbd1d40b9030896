# SPDX-License-Identifier: Apache-2.0
"""The tensors of a distributed checkpoint are pieces of its files."""

from fork.change import Change


change = Change(
    name="checkpoint-tensors",
    message="""\
perf(ckpt): load a distributed checkpoint as pieces of its files

An export loads the whole checkpoint before it writes anything.

Add a load strategy for Megatron Core that reads no values. PyTorch's DCP
says which parts of which chunks make up a tensor, however many ranks saved
it, and `torch.load` on the meta device says where the values of a chunk
are.
""",
    why="A checkpoint can be loaded without reading a value.",
    modules=["models/conversion/streaming/checkpoint.py"],
    problem=(
        "`AutoBridge.export_ckpt` holds the whole model in memory more than once: 11 GB for a model of 3B. This is "
        "the first of the changes that let an export read, convert, and write in blocks. It finds where in the "
        "files of a checkpoint the bytes of each tensor are."
    ),
    unchanged=["No existing file changes."],
    changes=[
        "Nothing yet. `streaming-load` and `streaming-export` use it.",
    ],
    tested=[
        "Tensors that one or several ranks saved, cut along each axis and with padding, and damaged files.",
    ],
    later=[
        "`streaming-load` makes a model of these pieces, and `streaming-export` writes it.",
    ],
    tests={"tests/unit/bridge/test_streaming_checkpoint.py": "models/"},
    stands_on=["import-plan", "in-process-save"],
)
