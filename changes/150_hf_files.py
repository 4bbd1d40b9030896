# SPDX-License-Identifier: Apache-2.0
"""Checks the files of a Hugging Face checkpoint: index, shards, headers."""

from fork.change import Change


change = Change(
    name="hf-files",
    message="""\
feat(model): check the files of a Hugging Face checkpoint

A shard that is missing or short, or an index that names what is not there,
showed late. Read index and headers, and name the file that is wrong. Two sets
of weights in one folder are refused: transformers would take the other one.
""",
    why="The files of a Hugging Face checkpoint can be checked without reading a weight.",
    modules=["models/conversion/hf_files.py"],
    problem="A damaged or doubled file of a checkpoint is found when its tensors are read, or not at all.",
    changes=["Nothing yet: `hf-checkpoint` uses it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of each damage on the CPU."],
    tests={"tests/unit/bridge/test_hf_files.py": "models/test_hf_files.py"},
    stands_on=["safetensors-header"],
)
