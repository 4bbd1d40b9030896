# SPDX-License-Identifier: Apache-2.0
"""What the keys of config.json mean for Megatron Core's model, a table for each family. Data only.

A key is in one column. What is in none has to be at its default (`config_check.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Keys:
    """The keys of a family.

    Attributes:
        same: The field of Bridge's model provider that has the same value.
        opposite: The field that has the opposite value.
        products: The field that is the product of this key and the one in the second place.
        only: The values with which the family's model is Megatron Core's; any other changes the function.
        never: The values with which it is not.
    """

    same: Mapping[str, str]
    opposite: Mapping[str, str] = field(default_factory=dict)
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    never: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


# Keys that no family's function depends on: what identifies a model, what generation and training use, and other
# spellings of a key that is compared.
WITHOUT_MEANING = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip

# Keys that `config_check.py` and `rope_scaling.py` put together before they compare: RoPE, heads, windows,
# activation, kinds of layers.
COMPARED = frozenset({
    "decoder_sparse_step", "first_k_dense_replace", "head_dim", "hidden_act", "hidden_activation", "layer_types",
    "max_window_layers", "mlp_layer_types", "mlp_only_layers", "moe_layer_freq", "num_key_value_heads",
    "num_local_experts", "original_max_position_embeddings", "partial_rotary_factor", "qk_head_dim",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern", "use_sliding_window",
})  # fmt: skip

# The values with which the models of all families are Megatron Core's.
ONLY = {"is_causal": (True,)}

_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
DENSE = _SIZES | {"intermediate_size": "ffn_hidden_size", "rms_norm_eps": "layernorm_epsilon"}
_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
# transformers masks with a window of no tokens, too.
_NO_WINDOW = {"sliding_window": (0, -1)}
# Megatron Core takes zero for none.
_ZERO = {"routed_scaling_factor": (0.0,), "router_scaling_factor": (0.0,), "topk_group": (0,)}
# What these families don't read, and Bridge's providers do.
_NO_GROUPS = {"n_group": (None, 1), "topk_group": (None, 1)}
_SOFTMAX = _NO_GROUPS | {"scoring_func": ("softmax",), "routed_scaling_factor": (None, 1.0)}
_EXPERTS = DENSE | {
    "num_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
}
_ROUTED = DENSE | {
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
}
_LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
_SHARED = {"n_shared_experts": ("moe_intermediate_size", "moe_shared_expert_intermediate_size")}
# Megatron Core normalizes the scores of several experts, and leaves that of a single one as it is.
_SIGMOID = _ZERO | {"num_experts_per_tok": (1,)}
_NORMALIZED = {"norm_topk_prob": (True,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}

FAMILIES = {
    # Megatron Core has one switch for the biases of all linear layers.
    "llama": Keys(DENSE | {"attention_bias": "add_bias_linear", "mlp_bias": "add_bias_linear"}),
    # What transformers makes of a Mistral with `layer_types`.
    "ministral": Keys(DENSE, never=_NO_WINDOW),
    "mistral": Keys(DENSE, never=_NO_WINDOW),
    "qwen2": Keys(DENSE, never=_NO_WINDOW),
    "qwen3": Keys(DENSE, only=_NO_BIAS, never=_NO_WINDOW),
    "qwen3_moe": Keys(
        _EXPERTS,
        opposite={"norm_topk_prob": "moe_router_pre_softmax"},
        only=_NO_BIAS | _SOFTMAX,
        never=_NO_WINDOW,
    ),
    "deepseek_v2": Keys(
        _ROUTED | _LATENT,
        products=_SHARED,
        only=_NO_BIAS
        | {
            "norm_topk_prob": (False,),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
        never=_ZERO,
    ),
    "deepseek_v3": Keys(
        _ROUTED | _LATENT,
        products=_SHARED,
        only=_NO_BIAS | _NORMALIZED | {"rope_interleave": (True,)},
        # transformers stops without numbers.
        never=_SIGMOID | {"n_group": (None,), "topk_group": (0, None)},
    ),
    "glm4_moe": Keys(
        _ROUTED | {"attention_bias": "add_qkv_bias", "use_qk_norm": "qk_layernorm"},
        products=_SHARED,
        only=_NORMALIZED,
        never=_SIGMOID,
    ),
    "glm4_moe_lite": Keys(
        _ROUTED | _LATENT,
        products=_SHARED,
        only=_NO_BIAS | _NORMALIZED | {"rope_interleave": (True,)},
        never=_SIGMOID,
    ),
    "hy_v3": Keys(
        _EXPERTS | {"router_scaling_factor": "moe_router_topk_scaling_factor"},
        products={"num_shared_experts": ("moe_intermediate_size", "moe_shared_expert_intermediate_size")},
        only=_NO_BIAS | _NO_GROUPS | {"enable_moe_fp32_combine": (True, False)},
        never=_SIGMOID,
    ),
    "gpt_oss": Keys(
        _SIZES
        | {
            "intermediate_size": "moe_ffn_hidden_size",
            "rms_norm_eps": "layernorm_epsilon",
            "num_local_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
        },
        only=_SOFTMAX | {"attention_bias": (True,), "swiglu_limit": (7.0,)},
        never=_NO_WINDOW,
    ),
    "gemma": Keys(
        DENSE,
        only=_NO_BIAS | {"use_bidirectional_attention": (None, False)},
    ),
    "nemotron": Keys(
        _SIZES | {"intermediate_size": "ffn_hidden_size", "norm_eps": "layernorm_epsilon"},
        only=_NO_BIAS,
    ),
    "olmoe": Keys(
        _SIZES
        | {
            "intermediate_size": "moe_ffn_hidden_size",
            "rms_norm_eps": "layernorm_epsilon",
            "num_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
        },
        opposite={"norm_topk_prob": "moe_router_pre_softmax"},
        only=_NO_BIAS | _SOFTMAX | {"clip_qkv": (None,)},
    ),
}

# Families without a table that were compared, and differ. Core 0.19 has no options for what transformers computes.
ANOTHER_FUNCTION = {
    "ernie4_5_moe": (
        "the routers of Megatron Core score experts by a sigmoid, those of transformers by a softmax with a "
        "correction bias, which Megatron Core can't combine"
    ),
}

# What transformers calls an activation, and what Bridge's providers have for it.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "fast_gelu",
    "gelu_pytorch_tanh": "fast_gelu",
    "fast_gelu": "fast_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "squared_relu": "squared_relu",
    "quick_gelu": "quick_gelu",
}
