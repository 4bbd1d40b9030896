# SPDX-License-Identifier: Apache-2.0
"""Safetensors files are written in blocks."""

from fork.change import Change


change = Change(
    name="safetensors-files",
    message="""\
perf(ckpt): write safetensors files in blocks

A file takes tensors of any size, block by block, by several threads. Its
bytes are those that `safetensors.torch.save_file` writes. A model is divided
into files as its source is, or by their size, as `save_pretrained` does.
""",
    why="A model can be written without holding a tensor in memory.",
    modules=["models/conversion/streaming/safetensors_files.py"],
    problem=(
        "`safetensors.torch.save_file` takes tensors in memory, all of a file at once: 5 GB for most models. This change "
        "writes the same file in blocks of 1 MiB."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: `streaming-export` uses it."],
    tested=["Every byte is that of safetensors' own file, for tensors of any dtype and shape, and several threads."],
    tests={"tests/unit/bridge/test_safetensors_files.py": "models/"},
    stands_on=["streaming-executor", "hf-files", "import-plan"],
)
