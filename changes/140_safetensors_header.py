# SPDX-License-Identifier: Apache-2.0
"""Reads what files of weights hold: the headers of safetensors files, and files of torch.save."""

from fork.change import Change


change = Change(
    name="safetensors-header",
    message="""\
feat(model): read the header of a safetensors file

The safetensors library checks a file and says shapes and dtypes, but not
where a tensor is. Read that from the header, after the library's check. A
file of torch.save says the same, read with weights_only.
""",
    why="What a file of weights holds, and where, is known without reading a weight.",
    modules=["models/conversion/safetensors_header.py", "models/conversion/torch_files.py"],
    problem="Nothing in Bridge says where in a file a tensor is.",
    changes=["Nothing yet: `hf-files` and the streaming import use it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of sound and damaged files on the CPU."],
    tests={
        "tests/unit/bridge/test_safetensors_header.py": "models/test_safetensors_header.py",
    },
)
