# SPDX-License-Identifier: Apache-2.0
"""Values of config.json from which no model is made, or one that computes no numbers."""

import logging
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeGuard

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron.bridge.models.conversion import rope_scaling
from megatron.bridge.models.conversion.config_keys import FAMILIES
from megatron.bridge.release_checkpoint import proof


logger = logging.getLogger(__name__)

# What has to be a whole number of so much or more, where a config has it.
_WHOLE = {
    **dict.fromkeys(
        (
            "head_dim", "hidden_size", "intermediate_size", "kv_lora_rank", "max_position_embeddings",
            "moe_intermediate_size", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
            "num_key_value_heads", "qk_head_dim", "v_head_dim", "vocab_size",
        ),
        1,
    ),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "num_nextn_predict_layers", "topk_group"), 0),
}  # fmt: skip
# Of these, null means something.
_OR_NULL = ("head_dim", "kv_lora_rank", "max_position_embeddings", "n_group", "topk_group")
# What transformers or Bridge reads, whether the class of the config has it or not.
_READ_BY_ALL = ("head_dim", "n_group", "topk_group")
_ABOVE_ZERO = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor")
# What a scaling of RoPE needs.
_SCALINGS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def check_values(bridge: Any, strict: bool = True) -> None:
    """Refuse a config from which no model is made. Reads no weights.

    Args:
        bridge: An `AutoBridge`.
        strict: False turns the error into a warning.

    Raises:
        ValueError: transformers doesn't make a model of the config, or its logits are no numbers.
    """
    source = getattr(bridge, "hf_pretrained", None)
    config = getattr(source, "config", source)
    if getattr(config, "model_type", None) not in FAMILIES:
        return
    config = rope_scaling.own_config(config)
    if not (wrong := list(value_problems(config))):
        return
    line = f"config.json of {config.model_type}: {'; '.join(wrong[:3])}"
    if strict:
        raise ValueError(
            f"{line}: transformers can't compute such a model. Take config.json from the model's publisher, or pass "
            "strict=False (--no-strict)"
        )
    what = f"{line}: transformers can't compute such a model, so nothing can be compared"
    proof.warn(logger, what, unproved=what)


def value_problems(config: Any) -> Iterator[str]:
    """Give what of a config no model can have, in a few words each.

    Args:
        config: A config of a family in `FAMILIES`, in transformers' class.
    """
    values = config.to_dict()
    kind: type = type(config)
    declared = _declared(kind)
    for key, least in _WHOLE.items():
        value = values.get(key)
        if key not in declared and key not in _READ_BY_ALL or value is None and (key in _OR_NULL or key not in values):
            continue
        if not _is_whole(value, least):
            yield f"{key} is {value!r}, expected a whole number of {least} or more"
    for key in ("rms_norm_eps", "norm_eps"):
        if key in values and not _is_number(values[key], 0.0):
            yield f"{key} is {values[key]!r}, expected a number of 0 or more"
    for key in ("routed_scaling_factor", "router_scaling_factor"):
        if key in values and values[key] is not None and not _is_number(values[key], -math.inf):
            yield f"{key} is {values[key]!r}, expected a number"
    if not _is_number(values.get("attention_dropout", 0.0), 0.0, 1.0):
        yield f"attention_dropout is {values['attention_dropout']!r}, expected a number from 0 to 1"
    if values.get("decoder_sparse_step") == 0 and config.model_type == "qwen3_moe":
        yield "decoder_sparse_step is 0, expected a whole number of 1 or more"
    yield from _heads(config)
    yield from _padding(config)
    yield from _activation(config)
    yield from _windows(config)
    yield from _experts(config)
    yield from _rope(rope_scaling.rope_parameters(config))


@cache
def _declared(kind: type) -> frozenset[str]:
    return frozenset(kind().to_dict())


def _is_whole(value: Any, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float, most: float = math.inf) -> TypeGuard[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most


def _heads(config: Any) -> Iterator[str]:
    heads, groups, size = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if _is_whole(heads, 1) and _is_whole(groups, 1):
        if getattr(config, "kv_lora_rank", None) and groups != heads:
            yield f"num_key_value_heads is {groups}, expected {heads} as num_attention_heads, with latent attention"
        elif heads % groups:
            yield f"num_key_value_heads is {groups}, expected a divisor of num_attention_heads ({heads})"
    if _is_whole(size, 1) and size % 2:
        yield f"head_dim is {size}, expected an even number, because RoPE turns pairs"


def _padding(config: Any) -> Iterator[str]:
    token, rows = getattr(config, "pad_token_id", None), config.vocab_size
    if token is not None and _is_whole(rows, 1) and not (isinstance(token, int) and -rows <= token < rows):
        yield f"pad_token_id is {token!r}, expected less than vocab_size ({rows}), or null"


def _activation(config: Any) -> Iterator[str]:
    for key in ("hidden_act", "hidden_activation"):
        name = getattr(config, key, None)
        if name is not None and name not in ACT2FN:
            yield f"{key} is {name!r}, which transformers doesn't have"


def _windows(config: Any) -> Iterator[str]:
    if config.model_type not in rope_scaling.WINDOWS_BY_LAYER:
        return
    kinds, layers = getattr(config, "layer_types", None) or (), config.num_hidden_layers
    if kinds and _is_whole(layers, 1) and len(kinds) < layers:
        yield f"layer_types has {len(kinds)} entries, expected {layers}"
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        yield "layer_types has 'sliding_attention', and sliding_window is None"


def _experts(config: Any) -> Iterator[str]:
    key = next((each for each in _EXPERTS if each in FAMILIES[config.model_type].same), None)
    if key is None:
        return
    experts, chosen = getattr(config, key), config.num_experts_per_tok
    if not _is_whole(experts, 1):
        yield f"{key} is {experts!r}, expected a whole number of 1 or more"
    elif _is_whole(chosen, 1) and chosen > experts:
        yield f"num_experts_per_tok is {chosen}, expected at most {experts}, the number of experts"
    elif "n_group" in FAMILIES[config.model_type].same and _is_whole(chosen, 1):
        yield from _groups(config, experts, chosen)


def _groups(config: Any, experts: int, chosen: int) -> Iterator[str]:
    """Transformers rates a group by its best two experts, except in DeepSeek-V2."""
    groups, some = config.n_group, config.topk_group
    if not _is_whole(groups, 2) or not _is_whole(some, 1):
        return
    least = 1 if config.model_type == "deepseek_v2" else 2
    if experts % groups or experts // groups < least:
        yield f"n_group is {groups}, expected groups of equal size, of {least} or more of {experts} experts"
    elif some > groups:
        yield f"topk_group is {some}, expected at most n_group ({groups})"
    elif chosen > some * (experts // groups):
        yield f"num_experts_per_tok is {chosen}, expected at most {some * (experts // groups)}, those of topk_group"


def _rope(rope: dict[str, Any]) -> Iterator[str]:
    kind = rope["rope_type"]
    if any(isinstance(each, dict) for each in rope.values()):
        return  # one for each kind of layer
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        yield f"rope_type is {kind!r}, which transformers doesn't have"
        return
    for key in _ABOVE_ZERO:
        value, needed = rope.get(key), key == "rope_theta" or key in _SCALINGS.get(kind, ())
        if (value is not None or needed) and not (_is_number(value, 0.0) and value > 0):
            yield f"{key} of RoPE is {value!r}, expected a number above 0"
    for key in _NUMBERS:
        if rope.get(key) is not None and not _is_number(rope[key], -math.inf):
            yield f"{key} of RoPE is {rope[key]!r}, expected a number"
    length = rope.get("original_max_position_embeddings")
    if length is not None and not _is_whole(length, 1):
        yield f"original_max_position_embeddings is {length!r}, expected a whole number of 1 or more"
