# SPDX-License-Identifier: Apache-2.0
"""Every key of config.json that changes what a model computes is carried into Megatron Core, or the import says so.

What counts is the effective config, as transformers has loaded it, and the model provider that Bridge has made of it.
`config_keys.py` has the families.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from megatron.bridge.models.conversion import layout_config, rope_scaling, router_groups, unproved_config
from megatron.bridge.models.conversion.config_keys import (
    ACTIVATIONS,
    ANOTHER_FUNCTION,
    COMPARED,
    FAMILIES,
    ONLY,
    WITHOUT_MEANING,
    Keys,
)
from megatron.bridge.release_checkpoint import proof


logger = logging.getLogger(__name__)


def check_config(bridge: Any, strict: bool = True) -> None:
    """Refuse a config that Bridge's model doesn't follow. Reads no weights.

    Args:
        bridge: An `AutoBridge`.
        strict: False turns the error into a warning.

    Raises:
        ValueError: A key of the config changes the function that transformers computes, and Bridge's model has
            another value or none.
    """
    config = rope_scaling.own_config(getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained))
    keys = FAMILIES.get(config.model_type) or layout_config.FAMILIES.get(config.model_type)
    if keys is None:
        wrong = list(unproved_config.known_problems(config))
    else:
        wrong = list(problems(config, bridge.to_megatron_provider(load_weights=False), keys))
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        line = f"config.json of {config.model_type}: {'; '.join(wrong[:3])}{more}"
        if strict:
            raise ValueError(
                f"{line}: Megatron Core would compute another model. Use a checkpoint without it, or pass "
                "strict=False (--no-strict)"
            )
        what = f"{line}: Megatron Core doesn't compute what transformers computes"
        proof.warn(logger, what, left_out=what)
    if keys is None:
        what = (
            f"{config.model_type} is not proved: the keys of its config.json were never compared with what Megatron "
            "Core computes"
        )
        if reason := ANOTHER_FUNCTION.get(config.model_type):
            what = f"{config.model_type} is another function in Megatron Core than in transformers: {reason}"
        proof.warn(logger, f"{what}. Compare the logits before you train", unproved=what)
        return
    for line in remarks(config):
        proof.warn(logger, line, unproved=line)


def problems(config: Any, provider: Any, keys: Keys) -> Iterator[str]:
    """Give what of the config the provider doesn't have, in a few words each."""
    values = config.to_dict()
    for key, field in keys.same.items():
        if key in values or hasattr(config, key):
            yield from _differ(key, getattr(config, key), _field(provider, field))
    for key, field in keys.opposite.items():
        if hasattr(config, key):
            yield from _differ(key, bool(getattr(config, key)), not _field(provider, field))
    for key, (other, field) in keys.products.items():
        if hasattr(config, key):
            product = (getattr(config, key) or 0) * getattr(config, other)
            yield from _differ(f"{key} x {other}", product, _field(provider, field) or 0)
    only = {**ONLY, **keys.only}
    for key, value in values.items():
        if key in only and value not in only[key]:
            expected = [repr(each) for each in only[key] if each is not None] or ["None"]
            yield f"{key} is {value!r}, expected {' or '.join(expected)}"
        if key in keys.never and value in keys.never[key]:
            yield f"{key} is {value!r}, expected another value"
    yield from _architecture(config)
    yield from _unknown(config, keys)
    yield from _latent_norms(config, provider)
    yield from router_groups.group_problems(config)
    yield from _heads(config, provider)
    yield from _activation(config, provider)
    yield from _kinds_of_layers(config, provider)
    yield from _kinds_of_attention(config)
    yield from _differ("sliding_window", rope_scaling.windows(config), rope_scaling.megatron_windows(provider))
    yield from layout_config.problems(config, provider)
    if not isinstance(provider.rotary_base, tuple):
        yield from rope_problems(config, provider)


def remarks(config: Any) -> Iterator[str]:
    """Give what a person should know of a config that is published and imported."""
    if config.model_type == "gemma" and config.hidden_act == "gelu":
        yield "hidden_act is 'gelu', which transformers computes. Gemma was trained with gelu_pytorch_tanh"
    if config.model_type != "deepseek_v2":
        return
    if config.topk_method == "group_limited_greedy":
        yield "Megatron Core rates a group of experts by the sum of its best, DeepSeek-V2 by its best one"
    if rope_scaling.rope_parameters(config).get("mscale_all_dim"):
        yield "Megatron Core scales attention by YaRN's mscale_all_dim, as DeepSeek's own code; transformers doesn't"


def _field(provider: Any, name: str) -> Any:
    return getattr(provider, name, None)


def _differ(key: str, found: Any, megatron: Any) -> Iterator[str]:
    close = isinstance(found, float) and isinstance(megatron, (int, float)) and math.isclose(found, megatron)
    if found != megatron and not close:
        yield f"{key} is {_short(found)}, Bridge's model has {_short(megatron)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _unknown(config: Any, keys: Keys) -> Iterator[str]:
    known = WITHOUT_MEANING | COMPARED | keys.same.keys() | keys.opposite.keys() | keys.products.keys()
    known |= ONLY.keys() | keys.only.keys() | keys.never.keys()
    defaults, read = _defaults(type(config)), _read(type(config))
    for key, value in config.to_dict().items():
        if key in known or key.startswith("_") or key in defaults and value == defaults[key]:
            continue
        if key in defaults or key in read:
            yield f"{key} is {_short(value)}, and nothing carries it into Bridge's model"
        else:
            logger.debug("config.json has %s, which transformers doesn't read", key)


@cache
def _defaults(kind: type) -> dict[str, Any]:
    return kind().to_dict()


@cache
def _read(kind: type) -> frozenset[str]:
    """Return the keys that the family's model reads, as its source names them."""
    source = inspect.getsource(rope_scaling.modeling_of(kind()))
    return frozenset(re.findall(r"\bconfig(?:\.|, \")(\w+)", source))


def _architecture(config: Any) -> Iterator[str]:
    """Bridge goes by `architectures`, transformers by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type].replace("Ministral", "Mistral")
    named = [each for each in getattr(config, "architectures", None) or () if each.endswith("ForCausalLM")]
    if named and named[0].lower() != made.lower():  # EXAONE MoE has two spellings
        yield f"architectures is {named[0]!r}, expected {made!r} for the model_type {config.model_type!r}"


def _latent_norms(config: Any, provider: Any) -> Iterator[str]:
    """Norms inside of transformers' latent attention have 1e-6. Up to 1e-5, that changes logits by less than 1e-4."""
    if _field(provider, "multi_latent_attention") and config.rms_norm_eps > 1e-5:
        yield f"rms_norm_eps is {config.rms_norm_eps}, which Bridge's latent attention uses, but not transformers'"


def _heads(config: Any, provider: Any) -> Iterator[str]:
    if _field(provider, "multi_latent_attention"):
        return
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    yield from _differ("head_dim", size, provider.kv_channels or config.hidden_size // heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    yield from _differ("num_key_value_heads", groups, provider.num_query_groups or heads)


def _activation(config: Any, provider: Any) -> Iterator[str]:
    key = next((each for each in ("hidden_act", "hidden_activation") if each in _read(type(config))), None)
    if key is None:
        return
    found, function = getattr(config, key), provider.activation_func
    name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", repr(function))
    if ACTIVATIONS.get(found, found) != ACTIVATIONS.get(name, name):
        yield f"{key} is {found!r}, Bridge's model has {name}"


def _kinds_of_layers(config: Any, provider: Any) -> Iterator[str]:
    if not _field(provider, "num_moe_experts"):
        return
    layers = config.num_hidden_layers
    if kinds := getattr(config, "mlp_layer_types", None):
        sparse = [kind == "sparse" for kind in kinds]
    else:
        read = {key: getattr(config, key, None) for key in _read(type(config))}
        dense, step = read.get("mlp_only_layers") or (), read.get("decoder_sparse_step") or 1
        first = read.get("first_k_dense_replace") or 0
        sparse = [i >= first and i not in dense and (i + 1) % step == 0 for i in range(layers)]
    frequency = provider.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [i % frequency == 0 for i in range(layers)]
    yield from _differ("layers with experts", sparse, [bool(each) for each in frequency])


def _kinds_of_attention(config: Any) -> Iterator[str]:
    kinds = set(getattr(config, "layer_types", None) or ()) if "layer_types" in _read(type(config)) else set()
    if others := kinds - {"full_attention", "sliding_attention"}:
        yield f"layer_types has {min(others)!r}, expected 'full_attention' or 'sliding_attention'"


def rope_problems(config: Any, provider: Any) -> Iterator[str]:
    """Compare what turns queries and keys, number by number, which covers every scaling and each of its parameters."""
    rope = rope_scaling.rope_parameters(config)
    shown = {key: value for key, value in rope.items() if value is not None}
    if rope["rope_type"] in ("dynamic", "longrope"):
        yield f"rope_type is {rope['rope_type']!r}, which changes with the length of the text"
        return
    frequencies, attention = rope_scaling.transformers_rope(config)
    found, scale = rope_scaling.megatron_rope(provider)
    if frequencies.shape != found.shape:
        yield f"RoPE {_short(shown)} turns {2 * len(frequencies)} dimensions, Bridge's model {2 * len(found)}"
    elif not torch.allclose(frequencies, found, rtol=1e-5, atol=0):
        yield f"RoPE {_short(shown)} has other frequencies than Bridge's model"
    elif not math.isclose(attention, scale, rel_tol=1e-5):
        yield f"RoPE {_short(shown)} multiplies by {attention:.6g}, Bridge's model by {scale:.6g}"
