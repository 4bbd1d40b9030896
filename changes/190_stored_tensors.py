# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint without their values, and which of them a bridge reads."""

from fork.change import Change


change = Change(
    name="stored-tensors",
    message="""\
feat(model): tell which tensors of a checkpoint a bridge reads

A bridge may read more than its mappings name: scales that it dequantizes
with, or a tensor in place of another. Try it on tensors on the meta device
that note who reads them.
""",
    why="What a conversion reads of a checkpoint can be told before a weight is read.",
    modules=["models/conversion/stored_tensors.py"],
    problem="Nothing tells which tensors of a checkpoint `AutoBridge.import_ckpt` reads and which it leaves out.",
    changes=["Nothing yet: `accounting` uses it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests with tensors in files and in memory on the CPU."],
    tests={"tests/unit/bridge/test_stored_tensors.py": "models/test_stored_tensors.py"},
    stands_on=["hf-checkpoint", "quantized-checkpoints"],
)
