# SPDX-License-Identifier: Apache-2.0
"""What Megatron-LM's args say of the function that a model computes, each in one form.

Args spell a model in several ways: no groups of queries is one for each head, a scaling by 1 is none. What a training
chooses for itself (precision, dropout, losses, lengths) is no part of the function.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.bridge.release_checkpoint.args import NEVER_READ, READ


# Args that are compared as they are, with the value that Megatron-LM has for None or in place of a missing one.
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization")),
    **dict.fromkeys(("layernorm_epsilon", "activation_func_clamp_value", "mtp_num_layers", "moe_latent_size")),
    **dict.fromkeys(("rotary_interleaved", "add_bias_linear", "add_qkv_bias", "layernorm_zero_centered_gamma"), False),
    **dict.fromkeys(("qk_layernorm", "qk_l2_norm", "multi_latent_attention"), False),
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "num_experts": None,
}
_EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size")),
    **dict.fromkeys(("moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_shared_expert_gate"), False),
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": 1.0,
}
_LATENT = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
# Args without a row in the table of `args.py`, which no config.json but that of the model itself can say.
UNSAID: dict[str, Any] = {
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "attention_output_gate"), False),
    **dict.fromkeys(("use_mup", "moe_apply_probs_on_input", "mtp_use_repeated_layer"), False),
    **dict.fromkeys(("experimental_attention_variant", "linear_attention_freq", "mrope_section", "softmax_scale")),
    **dict.fromkeys(("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")),
    **dict.fromkeys(("moe_router_topk_limited_devices", "moe_router_force_biased")),
    **dict.fromkeys(("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")),
    "moe_router_force_load_balancing": False,
}
NOT_FUNCTION = frozenset(
    [
        *("seq_length", "max_position_embeddings", "padded_vocab_size", "attention_dropout", "hidden_dropout"),
        *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "moe_router_dtype", "fp16", "bf16"),
        "moe_aux_loss_coeff",
    ]
)
"""Args of the table of `args.py` that a training may choose. The vocabulary and lengths are not compared here."""
PUT_TOGETHER = frozenset(
    [
        *("group_query_attention", "num_query_groups", "kv_channels", "untie_embeddings_and_output_weights"),
        *("swiglu", "squared_relu", "quick_geglu", "window_size", "window_attn_skip_freq", "moe_layer_freq"),
        *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"),
        *("use_rope_scaling", "rope_scaling_factor", "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
        *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "no_rope_freq"),
        *("yarn_correction_range_round_to_int", "moe_router_num_groups", "moe_router_group_topk"),
        "moe_router_load_balancing_type",
    ]
)
"""Args of which several make one fact."""
COMPARED = frozenset({*_PLAIN, *_EXPERTS, *_LATENT, *PUT_TOGETHER})
# Megatron-LM's values where no arg is given (arguments.py and MLATransformerConfig, core 0.19).
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "truncate": True}


def facts(args: Namespace) -> dict[str, Any]:
    """Return what args say of the function, by the name of the arg that says it.

    Args:
        args: Args of a checkpoint, which any version of Megatron-LM or `megatron_lm_args` has made.

    Returns:
        Facts. Those that these args don't have are left out. "tied", "windows" (tokens by layer), "sparse" (whether
        each layer has experts), "activation" and "rope" are put together.
    """
    found = {name: _or(args, name, default) for name, default in _PLAIN.items() if hasattr(args, name)}
    latent, experts = found.get("multi_latent_attention"), found.get("num_experts") or None
    found |= {"num_experts": experts} if "num_experts" in found else {}
    if "mtp_num_layers" in found:
        found["mtp_num_layers"] = found["mtp_num_layers"] or None
    for name in ("norm_epsilon", "apply_layernorm_1p"):
        field = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}[name]
        if field not in found and hasattr(args, name):
            found[field] = getattr(args, name)
    for table, wanted in ((_EXPERTS, experts), (_LATENT, latent)):
        found |= {name: _or(args, name, table[name]) for name in table if wanted and hasattr(args, name)}
    # It is about a softmax, and sigmoids have none (topk_routing_with_score_function, core 0.19).
    if found.get("moe_router_score_function", "softmax") != "softmax":
        found.pop("moe_router_pre_softmax", None)
    # The experts have the size of a dense layer if they have none of their own (TransformerConfig, core 0.19).
    if "moe_ffn_hidden_size" in found and found["moe_ffn_hidden_size"] is None:
        found["moe_ffn_hidden_size"] = found.get("ffn_hidden_size")
    found |= {name: _or(args, name, default) for name, default in UNSAID.items() if hasattr(args, name)}
    found |= {"add_qkv_bias": True} if found.get("add_bias_linear") else {}
    for name, value in (*_heads(args, latent), *_layers(args, experts)):
        found[name] = value
    if all(found.get("sparse") or [False]):
        found.pop("ffn_hidden_size", None)  # of dense layers, which it has none of
    if hasattr(args, "untie_embeddings_and_output_weights"):
        found["tied"] = not args.untie_embeddings_and_output_weights
    if hasattr(args, "swiglu"):
        gates = ("swiglu", "squared_relu", "quick_geglu")
        found["activation"] = next((name for name in gates if getattr(args, name, False)), "another")
    if hasattr(args, "rotary_base"):
        found["rope"] = rope(args)
    return found


def differ(one: Any, other: Any) -> bool:
    """Return whether two values of a fact are apart by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differ(value, other[name]) for name, value in one.items())
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (one, other))
    return not math.isclose(one, other, rel_tol=1e-6) if numbers else one != other


def rope(args: Namespace) -> dict[str, Any]:
    """Return how positions are encoded: "rope_type" as transformers calls it, "rope_theta", and the scaling's values.

    Megatron-LM up to core 0.19 has no flags for the original lengths of Llama 3's scaling and of latent attention.
    """
    latent = bool(getattr(args, "multi_latent_attention", False))
    kind = getattr(args, "position_embedding_type", None) or "rope"
    found = {"rope_theta": args.rotary_base, "rotary_percent": _or(args, "rotary_percent", 1.0)}
    scaled, stretched = _or(args, "use_rope_scaling", False), _or(args, "rotary_seq_len_interpolation_factor", 1)
    if skipped := getattr(args, "no_rope_freq", None):
        found["no_rope_freq"] = skipped
    if latent:
        kind = "yarn" if kind == "rope" and _or(args, "rope_type", "yarn") == "yarn" else kind
        scaled, stretched = False, 1
    if kind == "yarn":
        return found | _yarn(args, latent)
    if kind == "rope" and scaled and stretched == 1:
        return found | {"rope_type": "llama3", "factor": _or(args, "rope_scaling_factor", 8.0)}
    if kind == "rope" and stretched != 1:
        return found | {"rope_type": "linear, llama3" if scaled else "linear", "factor": stretched}
    return found | {"rope_type": "default" if kind == "rope" else kind}


def _yarn(args: Namespace, latent: bool) -> dict[str, Any]:
    factor = _or(args, "rotary_scaling_factor", 1.0)
    if factor == 1:
        return {"rope_type": "default"}
    scales = [scale for name in ("mscale", "mscale_all_dim") if (scale := getattr(args, name, None)) is not None]
    names = {name: name if latent else f"yarn_{name}" for name in _YARN}
    names["truncate"] = "yarn_correction_range_round_to_int"
    scaling = {name: _or(args, field, _YARN[name]) for name, field in names.items()}
    if latent:
        scaling |= {"mscale": _or(args, "mscale", 1.0), "mscale_all_dim": _or(args, "mscale_all_dim", 0.0)}
        del scaling["truncate"]
    else:
        growth = 0.1 * math.log(max(factor, 1.0))
        over, under = (growth * scale + 1 for scale in (scales if len(scales) == 2 else (1.0, 0.0)))
        scaling["attention_factor"] = over / under
    return {"rope_type": "yarn", "factor": factor, **scaling}


def _or(args: Namespace, name: str, default: Any) -> Any:
    value = getattr(args, name, None)
    return default if value is None else value


def _heads(args: Namespace, latent: bool | None) -> Iterator[tuple[str, Any]]:
    heads, width = getattr(args, "num_attention_heads", None), getattr(args, "hidden_size", None)
    if latent or not heads:
        return
    if hasattr(args, "num_query_groups") or hasattr(args, "group_query_attention"):
        grouped = getattr(args, "group_query_attention", True) and getattr(args, "num_query_groups", None)
        yield "num_query_groups", grouped or heads
    if width and hasattr(args, "kv_channels"):
        yield "kv_channels", args.kv_channels or width // heads


def _layers(args: Namespace, experts: int | None) -> Iterator[tuple[str, Any]]:
    layers = getattr(args, "num_layers", None) or 0
    if hasattr(args, "window_size"):
        size, skipped = args.window_size, getattr(args, "window_attn_skip_freq", None)
        # MiMo-V2-Flash has a number, of the tokens themselves. A window of later tokens stays as it is.
        window = list(size) if isinstance(size, tuple) else size
        if isinstance(window, list) and window[0] >= 0 == window[1]:
            window = window[0] + 1
        yield "windows", [window if size and _has_window(skipped, layer) else None for layer in range(layers)]
    if experts and hasattr(args, "moe_layer_freq"):
        frequency = args.moe_layer_freq or 1
        if isinstance(frequency, int):
            frequency = [int(layer % frequency == 0) for layer in range(layers)]
        yield "sparse", [bool(each) for each in frequency]
    if experts and hasattr(args, "moe_router_load_balancing_type"):
        # The others are losses, and this one chooses experts (TopKRouter.sinkhorn_load_balancing, core 0.19).
        yield "sinkhorn", "sinkhorn" in (args.moe_router_load_balancing_type or ())
    if experts and hasattr(args, "moe_router_num_groups"):
        groups = _or(args, "moe_router_num_groups", 1)
        yield "moe_router_num_groups", groups
        yield "moe_router_group_topk", _or(args, "moe_router_group_topk", 1) if groups > 1 else 1


def _has_window(skipped: Any, layer: int) -> bool:
    # is_layer_window_attention (megatron/core/transformer/utils.py, core 0.19), which counts from 1.
    if isinstance(skipped, (list, tuple)):
        return bool(skipped[layer])
    return not skipped or (layer + 1) % skipped != 0


def unknown() -> set[str]:
    """Return the args of the table in `args.py` that nothing here compares or passes over."""
    return {arg.name for arg in (*READ, *NEVER_READ)} - COMPARED - NOT_FUNCTION
