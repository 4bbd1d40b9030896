# SPDX-License-Identifier: Apache-2.0
"""Plans an import: which bytes of the Hugging Face checkpoint make which parameter of the model.

The model is made on the meta device: it has layers, names, shapes and dtypes, but no weights. Then each parameter is
replaced by a `PiecewiseTensor`, which the bridge's own mappings make of the tensors in the safetensors files. What the
model and Megatron Core do with parameters to make a sharded state dict, they do with these. So the tensors of that
state dict are the plan, and `execute.py` needs nothing else.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.transformer import MegatronModule

from megatron.bridge.models.conversion import accounting, casts
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.streaming.convert import Conversion
from megatron.bridge.models.conversion.streaming.model import (
    CannotStream,
    cannot_stream_if_it_fails,
    meta_model,
    replace_weights,
)
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)


def plan_import(bridge: "AutoBridge", target: str | os.PathLike) -> list[MegatronModule] | None:
    """Make the model of a bridge with parameters that are read from the checkpoint when they are saved.

    Collective: every rank calls it.

    Args:
        bridge: A bridge with a checkpoint. Its weights are neither read nor changed.
        target: Where the model will be saved.

    Returns:
        The model as `AutoBridge.to_megatron_model` returns it. None if the import can't be streamed; a warning says
        why.

    Raises:
        ValueError: A file of the checkpoint is damaged, or a tensor has another shape than the model's, or the account
            of the import is wrong (accounting.py).
    """
    try:
        _check(bridge, target)
        with cannot_stream_if_it_fails("its model can't be made without weights"):
            model = _without_weights(bridge)
        chunks, mappings = unwrap_model(model), bridge._model_bridge
        with cannot_stream_if_it_fails("its mappings need weights"):
            tasks = mappings.build_conversion_tasks(bridge.hf_pretrained, chunks)
        casts.warn_of_casts(accounting.account(mappings, bridge.hf_pretrained, chunks, tasks))
        conversion = Conversion(mappings, bridge.hf_pretrained.state.source)
        tasks = [task for task in tasks if task is not None and task.param_weight is not None]
        replace_weights(chunks, {task.param_weight: conversion.plan(task) for task in tasks})
        with cannot_stream_if_it_fails("its layout can't be told without weights"):
            _check_layout(chunks)
    except CannotStream as reason:
        logger.warning("%s is imported in memory, not streamed: %s.%s", _name(bridge), reason, _memory(bridge))
        return None
    return model


def _check(bridge: "AutoBridge", target: str | os.PathLike) -> None:
    if MultiStorageClientFeature.is_enabled() and str(target).startswith("msc://"):
        raise CannotStream("an object store takes whole files")
    own = type(bridge._model_bridge).load_weights_hf_to_megatron
    if own is not MegatronModelBridge.load_weights_hf_to_megatron:
        raise CannotStream("its bridge has a loader of its own")
    if not isinstance(bridge.hf_pretrained.state.source, SafeTensorsStateSource):
        raise CannotStream("its weights are not in files")


def _without_weights(bridge: "AutoBridge") -> list[MegatronModule]:
    provider = bridge.to_megatron_provider(load_weights=False)
    # As `to_megatron_provider` has it where weights are loaded.
    provider.perform_initialization = False
    return meta_model(provider)


def _check_layout(chunks: list[MegatronModule]) -> None:
    """Raise `CannotStream` if a tensor of the model's checkpoint has no values, or Megatron Core would need them."""
    for chunk in chunks:
        state_dict = chunk.sharded_state_dict()
        apply_factories(state_dict)
        for entry in nested_values(state_dict):
            if isinstance(entry, ShardedTensor):
                if entry.data is not None and entry.data.is_meta:
                    raise CannotStream(f"{entry.key} is not made of single parameters that the bridge maps")
            elif not isinstance(entry, ShardedBase) and isinstance(entry, torch.Tensor) and entry.is_meta:
                raise CannotStream("its checkpoint has tensors that are not sharded")


def _name(bridge: "AutoBridge") -> str:
    return getattr(bridge.hf_pretrained, "model_name_or_path", None) or type(bridge._model_bridge).__name__


def _memory(bridge: "AutoBridge") -> str:
    """Say how much memory the import in memory takes, if the weights are in files of a known folder."""
    source = getattr(getattr(bridge.hf_pretrained, "state", None), "source", None)
    folder = Path(getattr(source, "path", None) or _name(bridge))
    files = [*folder.glob("*.safetensors")] or folder.glob("pytorch_model*.bin")
    size = sum(file.stat().st_size for file in files)
    return f" It takes about {size / 1e6:,.0f} MB of memory, the size of its weights." if size else ""
