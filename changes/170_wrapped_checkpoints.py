# SPDX-License-Identifier: Apache-2.0
"""Tells checkpoints of wrapped models: adapters, torch.compile, FSDP, DistributedDataParallel."""

from fork.change import Change


change = Change(
    name="wrapped-checkpoints",
    message="""\
fix(ckpt): recognize checkpoints of wrapped models

A PEFT adapter, or a model that torch.compile wrapped, was called incomplete,
with the advice to download the whole checkpoint.

Recognize them by the names of their tensors and by adapter_config.json, and
say what to do.
""",
    why="A checkpoint of a wrapped model is refused as what it is, with what to do.",
    modules=["models/conversion/wrapped.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a PEFT adapter says that the checkpoint is incomplete, and advises to download "
        "it again."
    ),
    changes=["Nothing yet: `quantized-checkpoints` uses it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of each wrapper on the CPU."],
    tests={"tests/unit/bridge/test_wrapped.py": "models/test_wrapped.py"},
)
