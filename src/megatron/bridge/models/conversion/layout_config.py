# SPDX-License-Identifier: Apache-2.0
"""What the keys of config.json mean in families whose layers ask for Transformer Engine.

Bridge's logits were compared with those of transformers, key by key, because Megatron-LM's `pretrain_gpt.py` has no
such models.
"""

from collections.abc import Iterator
from typing import Any

from megatron.bridge.models.conversion.config_keys import DENSE, Keys


_EXPERTS = DENSE | {"num_experts_per_tok": "moe_router_topk"}
_GEMMA = {"attention_bias": (False, None), "use_bidirectional_attention": (None, False)}

FAMILIES = {
    "gemma2": Keys(
        DENSE
        | {
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        only=_GEMMA,
    ),
    "gemma3_text": Keys(
        DENSE,
        only=_GEMMA | {"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
        never={"query_pre_attn_scalar": (0,)},  # `problems` compares it
    ),
    "exaone4": Keys(DENSE),
    "exaone_moe": Keys(
        _EXPERTS
        | {
            "num_experts": "num_moe_experts",
            "moe_intermediate_size": "moe_ffn_hidden_size",
            "n_group": "moe_router_num_groups",
            "topk_group": "moe_router_group_topk",
            "routed_scaling_factor": "moe_router_topk_scaling_factor",
        },
        products={"num_shared_experts": ("moe_intermediate_size", "moe_shared_expert_intermediate_size")},
        only={"norm_topk_prob": (True,)},
        never={"num_experts_per_tok": (1,), "routed_scaling_factor": (0.0,)},
    ),
    "minimax_m2": Keys(
        _EXPERTS | {"num_local_experts": "num_moe_experts"},
        never={"num_experts_per_tok": (1,)},
    ),
}


def problems(config: Any, provider: Any) -> Iterator[str]:
    """Give what of the config the provider of one of these families doesn't have, besides single keys."""
    if config.model_type == "gemma3_text":
        scale = config.query_pre_attn_scalar**-0.5
        if provider.softmax_scale != scale:
            yield f"query_pre_attn_scalar scales by {scale}, Bridge's model by {provider.softmax_scale}"
        yield from _two_ropes(config, provider)
    if config.model_type in ("exaone4", "exaone_moe"):
        if config.sliding_window is None and "sliding_attention" in config.layer_types:
            yield "sliding_window is None, and layer_types has 'sliding_attention'"
        yield from _layers_without_positions(config, provider)


def _two_ropes(config: Any, provider: Any) -> Iterator[str]:
    """Gemma 3 turns queries and keys of windowed layers, and those of the others, each in its own way."""
    ropes = getattr(config, "rope_parameters", None) or {  # transformers 5, or 4
        "sliding_attention": {"rope_theta": config.rope_local_base_freq},
        "full_attention": {"rope_theta": config.rope_theta, **(config.rope_scaling or {})},
    }
    factors = {"sliding_attention": 1.0, "full_attention": provider.rope_scaling_factor or 1.0}
    for (kind, factor), base in zip(factors.items(), provider.rotary_base, strict=True):
        rope = ropes[kind]
        expected = {"rope_theta": base, "factor": factor, "partial_rotary_factor": 1.0}
        known = (rope.get("rope_type") or rope.get("type") or "default") in ("default", "linear")
        if not known or {name: rope.get(name, 1.0) for name in expected} != expected:
            yield f"RoPE {rope} of {kind} isn't that of Bridge's model, of base {base} and factor {factor}"


def _layers_without_positions(config: Any, provider: Any) -> Iterator[str]:
    """EXAONE has no RoPE in layers without a window, if others have one (`Exaone4Attention` of transformers 5)."""
    kinds = config.layer_types
    expected = [int(config.sliding_window is not None and kind == "full_attention") for kind in kinds]
    found = provider.no_rope_freq or [0] * len(kinds)
    if found != expected:
        yield f"layers without RoPE are {expected}, in Bridge's model {found}"
