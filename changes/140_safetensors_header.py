# SPDX-License-Identifier: Apache-2.0
"""Reads what files of weights hold: the headers of safetensors files, and files of torch.save."""

from fork.change import Change


change = Change(
    name="safetensors-header",
    message="""\
feat(model): read the header of a safetensors file

The safetensors library checks a file and returns shapes and dtypes, but not
where a tensor is. Read that from the header, after the library's check. Get
the same from a file of torch.save, read with weights_only.
""",
    why="What a file of weights holds, and where, is known without reading a weight.",
    modules=["models/conversion/safetensors_header.py", "models/conversion/torch_files.py"],
    problem=(
        "Nothing in Bridge knows where in a file of weights a tensor is, so `AutoBridge.import_ckpt` has to load it "
        "to use it."
    ),
    changes=["Nothing yet: `hf-files` and the streaming import use it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of sound and damaged files on the CPU."],
    tests={
        "tests/unit/bridge/test_safetensors_header.py": "models/test_safetensors_header.py",
    },
)
