# SPDX-License-Identifier: Apache-2.0
"""Maps between the layout of Transformer Engine's modules and that of Megatron Core's own.

The two differ in three ways:

- Transformer Engine stores the norm in front of a projection in the projection's module. The sharded keys of Megatron
  Core's own layers follow that for dense layers only (core 0.19, models/gpt/gpt_layer_specs.py:
  get_gpt_layer_local_submodules and get_gpt_layer_with_transformer_engine_submodules).
- Every module of Transformer Engine has an `_extra_state`.
- Transformer Engine stores the experts of a layer as numbered weights of one module,
  `experts.linear_fc1.weight0`. Megatron Core has a module for each, `experts.local_experts.0.linear_fc1.weight` (core
  0.19, transformer/moe/experts.py, SequentialMLP).
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.dist_checkpointing import ShardedTensor, check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron.bridge.release_checkpoint.layout import METADATA, as_path
from megatron.bridge.release_checkpoint.metadata import read_metadata


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping


__all__ = ["local_expert_mappings", "match_checkpoint", "with_transformer_engine_keys"]

HasParameter = Callable[[str], bool]

_EXTRA_STATE = "_extra_state"
_MODEL = re.compile(r"model\d*")


def _is_dense(has: HasParameter) -> bool:
    return not has("mlp.router.weight")


def _is_latent_attention(has: HasParameter) -> bool:
    return has("self_attention.linear_kv_up_proj.weight")


def _is_plain_attention(has: HasParameter) -> bool:
    return has("self_attention.linear_qkv.weight")


# A norm's key in Megatron Core's own layer, its key in Transformer Engine's, and the layers in which they differ.
FUSED_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_", _is_plain_attention),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", _is_dense),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", _is_latent_attention),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", _is_latent_attention),
)
# Parameters of modules that are no projections. With Transformer Engine, these modules have an `_extra_state`.
_STANDALONE = re.compile(r"(.*\.)?((\w*(layernorm|norm)\.)(weight|bias)|core_attention\.softmax_offset)")
_GROUPED_EXPERTS = re.compile(r"(.*\.experts\.)(linear_fc[12]\.(?:weight|bias))\*")


def with_transformer_engine_keys(state_dict: ShardedStateDict) -> ShardedStateDict:
    """Adds the entries that a model with Transformer Engine loads to the state dict of a model without it.

    The keys of Megatron Core's own layers stay, so that both kinds of model load the checkpoint. The new entries are
    small: norms under a second key, and an empty `_extra_state` for each module that has one with Transformer Engine.

    Args:
        state_dict: The state dict to save, with `model` sections as `sharded_state_dict` returned them.

    Returns:
        `state_dict` itself on a host with Transformer Engine, otherwise a new state dict.
    """
    if HAVE_TE:
        return state_dict
    result = dict(state_dict)
    for section in _sections(state_dict):
        result[section] = dict(state_dict[section])
        for name, tensor, key in _keys(state_dict[section]):
            if key != tensor.key:
                result[section][f"{name}@{key}"] = replace(tensor, key=key)
            if _STANDALONE.fullmatch(key):
                extra_state = _extra_state(tensor, key)
                # The weight and the bias of a module share one.
                module = name.rpartition(".")[0]
                result[section].setdefault(f"{module}@{extra_state.key}", extra_state)
    return result


def match_checkpoint(state_dict: ShardedStateDict, checkpoint_path: str) -> ShardedStateDict:
    """Renames the entries of a model without Transformer Engine to the keys that a checkpoint has for them.

    An entry whose key is in the checkpoint keeps it. An `_extra_state` that the checkpoint lacks is dropped, because
    it holds nothing.

    Args:
        state_dict: The state dict to load into.
        checkpoint_path: The folder that holds the payload.

    Returns:
        `state_dict` itself on a host with Transformer Engine, otherwise a new state dict.
    """
    if HAVE_TE or not check_is_distributed_checkpoint(checkpoint_path):
        return state_dict
    present = _stored_keys(str(checkpoint_path))
    result = dict(state_dict)
    for section in _sections(state_dict):
        entries = {
            name: entry
            for name, entry in state_dict[section].items()
            if not (isinstance(entry, ShardedObject) and name.endswith(_EXTRA_STATE) and entry.key not in present)
        }
        for name, tensor, key in _keys(state_dict[section]):
            if tensor.key not in present and key in present:
                entries[name] = replace(tensor, key=key)
        result[section] = entries
    return result


def _stored_keys(folder: str) -> set[str]:
    """Returns the keys of the entries of a checkpoint."""
    path = as_path(folder)
    if not isinstance(path, Path):
        return {entry.key for entry in load_sharded_metadata(folder).values()}
    # Megatron Core 0.19 can't list the tensors with PyTorch 2.15, whose TensorProperties have strides.
    found = read_metadata(path / METADATA)
    return {*found.tensors, *(name.partition("/shard_")[0] for name in found.objects)}


def local_expert_mappings(mappings: Iterable["MegatronParamMapping"]) -> list["MegatronParamMapping"]:
    """Returns mappings of experts in modules of their own, for grouped experts that have no such mapping yet.

    Args:
        mappings: The mappings of a bridge, with wildcards in their names.
    """
    mappings = list(mappings)
    present = {mapping.megatron_param for mapping in mappings}
    result = []
    for mapping in mappings:
        grouped = _GROUPED_EXPERTS.fullmatch(mapping.megatron_param)
        if grouped:
            local = copy.copy(mapping)
            local.megatron_param = f"{grouped[1]}local_experts.*.{grouped[2]}"
            if local.megatron_param not in present:
                result.append(local)
    return result


def _sections(state_dict: ShardedStateDict) -> list[str]:
    return [name for name, value in state_dict.items() if _MODEL.fullmatch(name) and isinstance(value, dict)]


def _keys(section: dict[str, Any]) -> Iterator[tuple[str, ShardedTensor, str]]:
    """Yields the name, the tensor, and Transformer Engine's key of each parameter that is not a projection's."""
    for name, entry in section.items():
        if isinstance(entry, ShardedTensor):
            key = _transformer_engine_key(name, entry.key, section)
            if key != entry.key or _STANDALONE.fullmatch(key):
                yield name, entry, key


def _transformer_engine_key(name: str, key: str, section: dict[str, Any]) -> str:
    for own, fused, is_fused in FUSED_NORMS:
        layer, found, parameter = name.rpartition(own)
        if not found or "." in parameter or (layer and not layer.endswith(".")):
            continue
        stem = key.removesuffix(own + parameter).removesuffix(fused + parameter)
        in_layer = {other.removeprefix(layer) for other in section if other.startswith(layer)}
        return stem + (fused if is_fused(in_layer.__contains__) else own) + parameter
    return key


def _extra_state(tensor: ShardedTensor, key: str) -> ShardedObject:
    """Returns the empty extra state of the module that has `tensor` as a parameter with the key `key`."""
    axes = tensor.prepend_axis_num
    return ShardedObject(
        key=f"{key.rpartition('.')[0]}.{_EXTRA_STATE}",
        data=None,
        global_shape=tensor.global_shape[:axes] or (1,),
        global_offset=tensor.global_offset[:axes] or (0,),
        replica_id=tensor.replica_id,
    )
