# SPDX-License-Identifier: Apache-2.0
"""Checkpoint keys of a model without Transformer Engine that one with it asks for, and the way back.

Transformer Engine keeps the norm in front of a projection in the projection's module, and every module of it has an
`_extra_state`. Megatron Core's own layers have neither, and their sharded keys follow Transformer Engine's for dense
layers only (core 0.19, models/gpt/gpt_layer_specs.py: get_gpt_layer_local_submodules, its sharded_state_dict_keys_map,
against get_gpt_layer_with_transformer_engine_submodules). `with_transformer_engine_keys` adds what is missing when
such a model is saved, `match_checkpoint` finds it by the name that the checkpoint has when it is loaded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor, check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.extensions.transformer_engine import HAVE_TE


Layer = Callable[[str], bool]  # whether the layer has a parameter of that name

_EXTRA_STATE = "_extra_state"
_MODEL = re.compile(r"model\d*")


def _is_dense(has: Layer) -> bool:
    return not has("mlp.router.weight")


def _is_latent_attention(has: Layer) -> bool:
    return has("self_attention.linear_kv_up_proj.weight")


def _is_plain_attention(has: Layer) -> bool:
    return has("self_attention.linear_qkv.weight")


# The norm of Megatron Core's own layer, the projection that holds it in Transformer Engine's, and the layers where it
# does.
_FUSED_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_", _is_plain_attention),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", _is_dense),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", _is_latent_attention),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", _is_latent_attention),
)
# Modules that hold nothing but these parameters; with Transformer Engine each has an `_extra_state`.
_STANDALONE = re.compile(r"(.*\.)?((\w*(layernorm|norm)\.)(weight|bias)|core_attention\.softmax_offset)")


def with_transformer_engine_keys(state_dict: ShardedStateDict) -> ShardedStateDict:
    """Adds the entries that a model with Transformer Engine asks for to the state dict of one without.

    The keys of Megatron Core's own layers stay, so that both kinds of model load the checkpoint. What is added is
    small: norms under a second name, and an empty `_extra_state` for each module that has one with Transformer Engine.

    Args:
        state_dict: the state dict to be saved, its `model` sections as `sharded_state_dict` made them.

    Returns:
        `state_dict` itself on a host with Transformer Engine, otherwise a new one.
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
                # One for the weight and the bias of a module.
                module = name.rpartition(".")[0]
                result[section].setdefault(f"{module}@{extra_state.key}", extra_state)
    return result


def match_checkpoint(state_dict: ShardedStateDict, checkpoint_path: str) -> ShardedStateDict:
    """Gives the entries of a model without Transformer Engine the keys that a checkpoint has for them.

    An entry whose key is in the checkpoint keeps it; the `_extra_state` of a module that the checkpoint has none for
    is dropped, as it holds nothing.

    Args:
        state_dict: the state dict to be loaded into.
        checkpoint_path: the folder that holds the payload.

    Returns:
        `state_dict` itself on a host with Transformer Engine, otherwise a new one.
    """
    if HAVE_TE or not check_is_distributed_checkpoint(checkpoint_path):
        return state_dict
    stored = load_sharded_metadata(str(checkpoint_path))
    present = {entry.key for entry in stored.values()}
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


def _sections(state_dict: ShardedStateDict) -> list[str]:
    return [name for name, value in state_dict.items() if _MODEL.fullmatch(name) and isinstance(value, dict)]


def _keys(section: dict[str, Any]) -> Iterator[tuple[str, ShardedTensor, str]]:
    """Yields name, tensor and the key with Transformer Engine of every parameter that is not of a projection."""
    for name, entry in section.items():
        if isinstance(entry, ShardedTensor):
            key = _transformer_engine_key(name, entry.key, section)
            if key != entry.key or _STANDALONE.fullmatch(key):
                yield name, entry, key


def _transformer_engine_key(name: str, key: str, section: dict[str, Any]) -> str:
    for own, fused, is_fused in _FUSED_NORMS:
        layer, found, parameter = name.rpartition(own)
        if not found or "." in parameter or (layer and not layer.endswith(".")):
            continue
        stem = key.removesuffix(own + parameter).removesuffix(fused + parameter)
        in_layer = {other.removeprefix(layer) for other in section if other.startswith(layer)}
        return stem + (fused if is_fused(in_layer.__contains__) else own) + parameter
    return key


def _extra_state(tensor: ShardedTensor, key: str) -> ShardedObject:
    """The empty extra state of the module that `tensor`, whose key is `key`, is a parameter of."""
    axes = tensor.prepend_axis_num
    return ShardedObject(
        key=f"{key.rpartition('.')[0]}.{_EXTRA_STATE}",
        data=None,
        global_shape=tensor.global_shape[:axes] or (1,),
        global_offset=tensor.global_offset[:axes] or (0,),
        replica_id=tensor.replica_id,
    )
