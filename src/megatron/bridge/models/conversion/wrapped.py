# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a wrapped model, which are refused as what they are: PEFT adapters, torch.compile, FSDP, DDP."""

import json
import re
from collections.abc import Iterable
from pathlib import Path


ADAPTER_CONFIG = "adapter_config.json"
_MERGE = "import its base model with adapter=DIR (--adapter DIR), which merges it"
# What a name of a tensor shows: (pattern, what the checkpoint is, what to do)
_WRAPPERS = (
    (re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\b|\.base_layer\."), "an unmerged PEFT adapter", _MERGE),
    (re.compile(r"^base_model\.model\."), "a model that PEFT wrapped", _MERGE),
    (
        re.compile(r"(^|\.)_orig_mod\."),
        "a model that torch.compile wrapped",
        "save model._orig_mod, or strip the prefix '_orig_mod.' from the names",
    ),
    (
        re.compile(r"(^|\.)_(fsdp_wrapped|checkpoint_wrapped)_module\."),
        "a model that FSDP or activation checkpointing wrapped",
        "save the model that is inside, or strip the prefix from the names",
    ),
    (
        re.compile(r"^module\."),
        "a model that DistributedDataParallel wrapped",
        "save model.module, or strip the prefix 'module.' from the names",
    ),
)


def check_adapter(path: Path) -> None:
    """Refuse a folder with a PEFT adapter, in place of a model or beside it.

    transformers loads the base model and the adapter from such a folder, and no weights of a model that lies there.

    Args:
        path: The folder of a checkpoint.

    Raises:
        ValueError: There is an adapter.
    """
    config = path / ADAPTER_CONFIG
    if not config.is_file():
        return
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    of = f" of {' '.join(str(base).split())[:200]}" if base else ""
    beside = any(any(path.glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))
    remedy = f"move the adapter into a folder of its own; to merge it, {_MERGE}" if beside else _MERGE
    raise ValueError(f"{path} has a PEFT adapter{of}{' beside its model' if beside else ''}: {remedy}")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors that carry the names of a wrapper.

    Args:
        path: The checkpoint, for the message.
        names: The names of its tensors.

    Raises:
        ValueError: A name is not that of a plain model.
    """
    names = sorted(names)
    for pattern, what, remedy in _WRAPPERS:
        found = next((name for name in names if pattern.search(name)), None)
        if found is not None:
            raise ValueError(f"{path} holds {what} ({found!r}): {remedy}")
