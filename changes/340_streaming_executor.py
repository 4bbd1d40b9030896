# SPDX-License-Identifier: Apache-2.0
"""Threads and the file form of a tensor, for an import that streams."""

from fork.change import Change


change = Change(
    name="streaming-executor",
    message="""\
perf(ckpt): write tensors in blocks

Jobs that write files run in threads, as many as the rank has processors, and
show their progress on a terminal. The archive that `torch.save` makes of a
tensor is made around values that come later, of any size.
""",
    why="A tensor can be written block by block in the form of torch.save.",
    modules=["models/conversion/streaming/archive.py", "models/conversion/streaming/execute.py"],
    problem=(
        "A save holds a tensor in memory until it is written, and `torch.save` holds the values of the tensor it "
        "saves. This change writes a tensor of any size in blocks of 1 MiB, in the form that `torch.save` gives "
        "it."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: `streaming-import` uses it."],
    tested=["Archives of more than 4 GiB and of more than the host's memory are read by `torch.load` and zipfile."],
    tests={
        "tests/unit/bridge/test_streaming_archive.py": "models/",
        "tests/unit/bridge/test_streaming_execute.py": "models/",
    },
    stands_on=["piecewise-tensor"],
)
