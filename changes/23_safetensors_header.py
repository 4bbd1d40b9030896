# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read and checked in one place."""

from fork.change import Change


change = Change(
    name="safetensors-header",
    message="""\
feat(ckpt): read the header of a safetensors file

The header says which tensors a file holds, and where, without reading them.
Checks of a checkpoint and the streaming import go by it.
""",
    why="The header of a safetensors file is read and checked in one place.",
    modules=["models/conversion/safetensors_header.py"],
    problem=(
        "Whether a safetensors file is whole shows late: `safe_open` of a file that is short fails when a tensor is read, "
        "in the middle of `AutoBridge.import_ckpt`."
    ),
    changes=["A module that reads the header of a safetensors file. Nothing uses it yet."],
    unchanged=["Everything that Bridge reads and writes."],
    tested=["Unit tests of headers that are damaged."],
    tests={"tests/unit/bridge/test_safetensors_header.py": "models/test_safetensors_header.py"},
)
