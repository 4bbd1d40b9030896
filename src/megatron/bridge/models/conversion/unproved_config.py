# SPDX-License-Identifier: Apache-2.0
"""What is known of families whose config.json has no table yet: values with which Bridge's model is another one.

Each was found by Bridge's logits beside those of transformers, with one value of a tiny model changed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.bridge.models.conversion.rope_scaling import rope_parameters


_SILU = {"hidden_act": ("silu", "swish")}
_TANH = {"hidden_activation": ("gelu_pytorch_tanh",)}
# The values with which the models are those of transformers.
ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "falcon_h1": _SILU,
    "gemma4": _TANH,
    "gemma4_text": _TANH,
    "glm_moe_dsa": {"norm_topk_prob": (True,)},
    "minimax_m3_vl": {"swiglu_alpha": (1.702,)},
    "nemotron_h": {"mlp_hidden_act": ("relu2",), "norm_topk_prob": (True,), "use_conv_bias": (True,)},
    "qwen3_5": _SILU,
    "qwen3_5_moe": _SILU,
    "qwen3_5_moe_text": _SILU,
    "qwen3_5_text": _SILU,
    "qwen3_next": _SILU | {"norm_topk_prob": (True,)},
}
# Megatron Core normalizes the scores of several experts, and leaves that of a single one as it is.
SEVERAL_EXPERTS = ("glm_moe_dsa", "minimax_m3_vl", "nemotron_h")
# The kinds of RoPE that Bridge's models have; most of these have no scaling, whatever the config says.
KINDS_OF_ROPE = dict.fromkeys(
    (
        "falcon_h1", "glm4v_moe", "glm_moe_dsa", "minimax_m3_vl", "qwen2_5_vl", "qwen2_audio", "qwen3_5",
        "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_vl", "qwen3_vl_moe",
    ),
    ("default", "mrope"),
) | {"qwen3_next": ("default", "linear")}  # fmt: skip


def known_problems(config: Any) -> Iterator[str]:
    """Give what of a config, or of its text model's, the family's model doesn't have, in a few words each."""
    kind, text = config.model_type, getattr(config, "text_config", config)
    for key, allowed in ONLY.get(kind, {}).items():
        if (value := getattr(text, key, allowed[0])) not in allowed:
            yield f"{key} is {value!r}, Bridge's model has {allowed[0]!r}"
    if kind in SEVERAL_EXPERTS and text.num_experts_per_tok == 1:
        yield "num_experts_per_tok is 1, expected two or more"
    if kind in KINDS_OF_ROPE and (rope := rope_parameters(text)["rope_type"]) not in KINDS_OF_ROPE[kind]:
        yield f"rope_type is {rope!r}, which Bridge's model doesn't have"
