# SPDX-License-Identifier: Apache-2.0
"""Threads and the file form of a tensor, for an import that streams."""

from fork.change import Change


change = Change(
    name="streaming-executor",
    message="""\
perf(ckpt): write tensors in blocks

Threads run jobs that write files, as many as the rank has processors, and
show their progress on a terminal. The archive that `torch.save` makes of a
tensor is written around values of any size, which come later.
""",
    why="A tensor can be written block by block in the form of torch.save.",
    modules=["models/conversion/streaming/archive.py", "models/conversion/streaming/execute.py"],
    problem=(
        "`torch.save`, with which `AutoBridge.import_ckpt` saves a checkpoint, needs each tensor in memory. This "
        "fifth of six changes writes a tensor of any size in blocks of 1 MiB, in the same form as `torch.save`."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: `streaming-import` uses it."],
    tested=[
        "`torch.load` and zipfile read archives of more than 4 GiB, and of more than the host's memory.",
    ],
    tests={
        "tests/unit/bridge/test_streaming_archive.py": "models/",
        "tests/unit/bridge/test_streaming_execute.py": "models/",
    },
    stands_on=["piecewise-tensor"],
)
