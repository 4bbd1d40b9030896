# SPDX-License-Identifier: Apache-2.0
"""Exports the adapters that Bridge has trained: merged into their base, or alone, as PEFT loads them."""

import functools
import importlib
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.bridge.host import accelerator
from megatron.bridge.models.hf_pretrained.export_staging import exports_whole
from megatron.bridge.release_checkpoint.layout import METADATA, RUN_CONFIG, as_path, resolve_checkpoint
from megatron.bridge.release_checkpoint.metadata import read_metadata


if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from megatron.bridge.models.conversion.adapter import Adapter
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

_ADAPTER = ".adapter."
# What makes adapters that PEFT's LoRA can express.
_KINDS = ("megatron.bridge.peft.lora.LoRA", "megatron.bridge.peft.canonical_lora.CanonicalLoRA")
_SETTINGS = ("target_modules", "exclude_modules", "dim", "alpha", "share_expert_adapters", "normalize_moe_lora")
_merging: ContextVar["Adapter | None"] = ContextVar("merging", default=None)


def holds_adapters(checkpoint: str | os.PathLike) -> bool:
    """Return whether a checkpoint holds adapters alone, without the model that they belong to."""
    metadata = as_path(resolve_checkpoint(checkpoint)) / METADATA
    if not isinstance(metadata, Path) or not metadata.is_file():
        return False
    return any(_ADAPTER in key and not key.startswith("optimizer.") for key in read_metadata(metadata).tensors)


@exports_whole
def export_adapter(bridge: "AutoBridge", megatron_path: str | os.PathLike, hf_path: str | os.PathLike) -> None:
    """Write the adapters of a checkpoint as an adapter that PEFT loads. The base is neither needed nor read.

    Args:
        bridge: The bridge of the base model.
        megatron_path: Checkpoint root or payload folder.
        hf_path: The folder of the adapter.

    Raises:
        ValueError: The checkpoint holds no adapters, or adapters of a kind that PEFT's LoRA can't express.
    """
    _write(bridge, megatron_path, hf_path)


def _write(bridge: "AutoBridge", megatron_path: str | os.PathLike, hf_path: str | os.PathLike) -> None:
    """Write an adapter. Where ranks have no group, each of them writes its own."""
    payload = resolve_checkpoint(megatron_path)
    if not holds_adapters(payload):
        raise ValueError(f"{megatron_path} holds no adapters: export it as a model, without --adapter-only")
    if not hasattr(bridge, "save_hf_adapter"):
        raise ValueError("this version of Megatron-Bridge exports no adapters: use 0.4 or later")
    lora = _trained_with(payload)
    with nullcontext() if dist.is_initialized() else accelerator.gloo_group(alone=True):
        accelerator.seed(0)
        model = _adapted(bridge, payload, lora)
        bridge.save_hf_adapter(model, os.fspath(hf_path), peft_config=lora, show_progress=False)


def exports_merged(export: Callable[..., None]) -> Callable[..., None]:
    """Decorate `AutoBridge.export_ckpt`: of a checkpoint with adapters alone, it exports their base, merged."""

    @functools.wraps(export)
    def exporting(bridge: "AutoBridge", megatron_path: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        if not holds_adapters(megatron_path):
            return export(bridge, megatron_path, *args, **kwargs)
        from megatron.bridge.models.conversion.adapter import Adapter

        if dist.is_initialized() and dist.get_world_size() > 1:
            what = f"{megatron_path} holds adapters alone, which a process group of {dist.get_world_size()} ranks"
            raise ValueError(f"{what} can't merge: destroy the group first, or use megatron-bridge export --processes")
        base = _base(resolve_checkpoint(megatron_path))
        with tempfile.TemporaryDirectory(prefix="megatron-bridge-adapter-") as folder:
            _write(bridge, megatron_path, path := Path(folder, "adapter"))
            token = _merging.set(Adapter(path))
            try:
                return export(bridge, base, *args, **kwargs)
            finally:
                _merging.reset(token)

    return exporting


def merged(model: Any) -> Any:
    """Return the model of an export that streams, into whose tensors the adapters are merged if there are any.

    Args:
        model: What `plan_export` has returned.

    Raises:
        ValueError: There are adapters, and the export doesn't stream.
    """
    if (adapter := _merging.get()) is None:
        return model
    if model is None:
        raise ValueError("adapters are merged only if the export streams: export the adapter alone (--adapter-only)")
    from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor

    tensors = model.streamed_tensors
    adapter.check("the base", tensors, "lm_head.weight" not in tensors)
    model.streamed_tensors = {
        name: adapter.merged_piecewise(name, PiecewiseTensor.wrap(tensor)).cast(tensor.dtype)
        for name, tensor in tensors.items()
    }
    return model


def _trained_with(payload: str) -> Any:
    """Return Bridge's own description of the adapters, as the run config has it."""
    settings = _run_config(payload).get("peft") or {}
    target = str(settings.get("_target_"))
    if target not in _KINDS:
        raise ValueError(
            f"{payload} was trained with {target}, expected {' or '.join(_KINDS)}: load it with Megatron-Bridge, and "
            "merge it there"
        )
    module, _, kind = target.rpartition(".")
    own = {name: settings[name] for name in _SETTINGS if name in settings}
    return getattr(importlib.import_module(module), kind)(**own)


def _base(payload: str) -> str:
    """Return the checkpoint that adapters were trained on."""
    from megatron.bridge.training.mlm_compat.checkpoints import base_of_adapters

    named = (_run_config(payload).get("checkpoint") or {}).get("pretrained_checkpoint")
    if not named or not Path(named).is_dir():
        raise ValueError(
            f"{payload} holds adapters alone, and their base {named} is not there: put it there, or export the "
            "adapter alone (--adapter-only)"
        )
    return base_of_adapters(named)


def _run_config(payload: str) -> dict[str, Any]:
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config

    return read_run_config(str(as_path(payload) / RUN_CONFIG))


def _adapted(bridge: "AutoBridge", payload: str, lora: Any) -> "list[MegatronModule]":
    """Return a model without weights, with adapters that have theirs."""
    from megatron.core import dist_checkpointing

    from megatron.bridge.models.conversion.streaming.checkpoint import StreamingLoadStrategy
    from megatron.bridge.models.conversion.streaming.model import meta_model
    from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
    from megatron.bridge.models.conversion.utils import unwrap_model
    from megatron.bridge.training import untrusted_checkpoint

    provider = bridge.to_megatron_provider(load_weights=False)
    provider.register_pre_wrap_hook(lambda chunks: lora(chunks, training=False))
    model = meta_model(provider)
    (chunk,) = unwrap_model(model)
    with untrusted_checkpoint.reading(payload):
        common = dist_checkpointing.load_common_state_dict(payload)
        content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        wanted = {name: each for name, each in chunk.sharded_state_dict(metadata=content).items() if _ADAPTER in name}
        loaded: Any = dist_checkpointing.load({"model": wanted}, payload, StreamingLoadStrategy())
    for name, value in loaded["model"].items():
        if isinstance(value, PiecewiseTensor):
            path, _, own = name.rpartition(".")
            setattr(chunk.get_submodule(path), own, torch.nn.Parameter(value.materialize(), requires_grad=False))
    return model
