# SPDX-License-Identifier: Apache-2.0
"""Safetensors files are written in blocks."""

from fork.change import Change


change = Change(
    name="safetensors-files",
    message="""\
perf(ckpt): write safetensors files in blocks

`safetensors.torch.save_file` needs all tensors of a file in memory.

Add a writer that takes tensors of any size block by block, from several
threads, and writes the bytes that `save_file` writes. A model is divided
into the files of its source, or into files of a given size as
`save_pretrained` does.
""",
    why="A model can be written without holding a tensor in memory.",
    modules=["models/conversion/streaming/safetensors_files.py"],
    problem=(
        "`safetensors.torch.save_file` needs all tensors of a file in memory: 5 GB for the files of most models. "
        "This is more than anything else in a conversion in blocks needs. This change writes the same file in blocks "
        "of 1 MiB."
    ),
    unchanged=["No existing file changes."],
    changes=[
        "Nothing yet. `streaming-export` uses it.",
    ],
    tested=[
        "Files with tensors of every dtype and of many shapes, written by several threads, equal those of "
        "`save_file` byte for byte.",
    ],
    later=[
        "`streaming-export` writes its files with it.",
    ],
    tests={"tests/unit/bridge/test_safetensors_files.py": "models/"},
    stands_on=["streaming-executor", "hf-files", "import-plan"],
)
