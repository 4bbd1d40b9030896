# SPDX-License-Identifier: Apache-2.0
"""Checks the files of a Hugging Face checkpoint: index, shards, headers."""

from fork.change import Change


change = Change(
    name="hf-files",
    message="""\
feat(model): check the files of a Hugging Face checkpoint

A missing or short shard, or an index that names a missing file, was found
late.

Read the index and the headers, and name the file that is wrong. Refuse two
sets of weights in one folder, of which transformers would use another.
""",
    why="The files of a Hugging Face checkpoint can be checked without reading a weight.",
    modules=["models/conversion/hf_files.py"],
    problem=(
        "`AutoBridge.import_ckpt` finds a damaged or duplicate file of a checkpoint only when it reads its tensors, "
        "or not at all."
    ),
    changes=["Nothing yet: `hf-checkpoint` uses it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of each damage on the CPU."],
    tests={"tests/unit/bridge/test_hf_files.py": "models/test_hf_files.py"},
    stands_on=["safetensors-header"],
)
