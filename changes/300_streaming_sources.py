# SPDX-License-Identifier: Apache-2.0
"""Values are read from files in blocks."""

from fork.change import Change


change = Change(
    name="streaming-sources",
    message="""\
perf(ckpt): read values from files in blocks

This is the first part of an import whose memory doesn't grow with the model.

A range of a file, or a tensor in memory, is a source of values that are read
block by block.
""",
    why="A checkpoint's values can be read block by block, in the memory of a block.",
    modules=["models/conversion/streaming/__init__.py", "models/conversion/streaming/sources.py"],
    problem=(
        "`AutoBridge.import_ckpt` holds the whole model in memory, and some of it twice: 18 GB for a model of 8B. A "
        "host that could store a large checkpoint can't convert it. This is the first of six changes that make an "
        "import read, convert, and write in blocks. It reads values from files."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: later changes use it."],
    tested=[
        "The memory that a read takes, files larger than the host's memory, and files that are cut off.",
    ],
    tests={"tests/unit/bridge/test_streaming_sources.py": "models/"},
    stands_on=[],
)
