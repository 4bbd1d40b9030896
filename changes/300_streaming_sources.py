# SPDX-License-Identifier: Apache-2.0
"""Values are read from files in blocks."""

from fork.change import Change


change = Change(
    name="streaming-sources",
    message="""\
perf(ckpt): read values from files in blocks

The first part of an import that needs no memory for the model: a range of a
file, and a tensor in memory, as sources of values that are read block by block.
""",
    why="A checkpoint's values can be read block by block, in the memory of a block.",
    modules=["models/conversion/streaming/__init__.py", "models/conversion/streaming/sources.py"],
    problem=(
        "`AutoBridge.import_ckpt` holds the whole model in memory, and some of it twice: 18 GB for a model of 8B. "
        "A host that could store a large checkpoint can't convert it. This is the first of six changes that make "
        "an import read, convert and write in blocks; it reads values from files."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: later changes use it."],
    tested=["The memory of a read, files larger than the host's memory, and files that are cut off."],
    tests={"tests/unit/bridge/test_streaming_sources.py": "models/"},
    stands_on=[],
)
