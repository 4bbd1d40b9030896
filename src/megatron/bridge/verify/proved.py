# SPDX-License-Identifier: Apache-2.0
"""Which configs need no proof, because Megatron-LM's logits of such a model were compared with transformers'.

Each row is a config that was compared. Words of a config count by value, numbers by class: 0, 1, or any other above 0.
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron.bridge.models.conversion import rope_scaling
from megatron.bridge.models.conversion.config_keys import FAMILIES


NUMBER = "n"
PROVED: dict[str, dict[str, str]] = {
    "deepseek_v2": {
        "attention_bias": "False",
        "hidden_act": "silu",
        "mlp_bias": "False",
        "n_group": "1",
        "norm_topk_prob": "False",
        "rope_type": "default yarn",
        "routed_scaling_factor": "1 n",
        "tie_word_embeddings": "False",
        "topk_group": "all",
        "topk_method": "greedy",
        "windows": "none",
    },
    "deepseek_v3": {
        "attention_bias": "False",
        "hidden_act": "silu",
        "mscale": "1 n",
        "mscale_all_dim": "1",
        "n_group": "1 n",
        "n_shared_experts": "1 n",
        "norm_topk_prob": "True",
        "rope_interleave": "True",
        "rope_type": "default yarn",
        "routed_scaling_factor": "1 n",
        "tie_word_embeddings": "False",
        "topk_group": "all some",
        "windows": "none",
    },
    "gemma": {
        "attention_bias": "False",
        "head_dim": "usual",
        "hidden_act": "gelu gelu_pytorch_tanh silu",
        "rope_type": "default",
        "tie_word_embeddings": "True",
        "use_bidirectional_attention": "None",
        "windows": "none",
    },
    "glm4_moe": {
        "attention_bias": "False True",
        "groups": "1 all n",
        "head_dim": "other usual",
        "hidden_act": "gelu silu",
        "n_group": "1 n",
        "n_shared_experts": "1",
        "norm_topk_prob": "True",
        "partial_rotary_factor": "1 n",
        "rope_type": "default linear",
        "routed_scaling_factor": "1 n",
        "tie_word_embeddings": "False",
        "topk_group": "all some",
        "use_qk_norm": "False True",
        "windows": "none",
    },
    "glm4_moe_lite": {
        "attention_bias": "False",
        "hidden_act": "silu",
        "n_group": "1 n",
        "n_shared_experts": "1 n",
        "norm_topk_prob": "True",
        "rope_interleave": "True",
        "rope_type": "default yarn",
        "tie_word_embeddings": "False",
        "topk_group": "all some",
        "windows": "none",
    },
    "gpt_oss": {
        "attention_bias": "True",
        "beta_slow": "1",
        "groups": "1 all n",
        "head_dim": "other usual",
        "hidden_act": "gelu silu",
        "rope_type": "default yarn",
        "tie_word_embeddings": "False",
        "truncate": "False True",
        "windows": "some",
    },
    "hy_v3": {
        "attention_bias": "False",
        "enable_moe_fp32_combine": "True",
        "head_dim": "usual",
        "hidden_act": "silu",
        "mlp_bias": "False",
        "num_shared_experts": "1 n",
        "rope_type": "default yarn",
        "tie_word_embeddings": "False True",
        "windows": "none",
    },
    "llama": {
        "attention_bias": "False True",
        "attention_factor": "1",
        "factor": "1 n",
        "groups": "1 all n",
        "head_dim": "other usual",
        "hidden_act": "gelu silu",
        "low_freq_factor": "1",
        "mlp_bias": "False True",
        "mscale": "1 n",
        "rope_type": "default linear llama3 yarn",
        "tie_word_embeddings": "False True",
        "truncate": "False",
        "windows": "none",
    },
    "mistral": {
        "groups": "1 n",
        "head_dim": "other usual",
        "hidden_act": "silu",
        "low_freq_factor": "1",
        "rope_type": "default linear llama3 yarn",
        "tie_word_embeddings": "False True",
        "windows": "all none",
    },
    "nemotron": {
        "attention_bias": "False",
        "groups": "1 n",
        "head_dim": "other usual",
        "hidden_act": "relu2",
        "mlp_bias": "False",
        "partial_rotary_factor": "1 n",
        "rope_type": "default linear",
        "tie_word_embeddings": "False True",
        "windows": "none",
    },
    "olmoe": {
        "attention_bias": "False",
        "clip_qkv": "None",
        "groups": "all n",
        "head_dim": "usual",
        "hidden_act": "silu",
        "norm_topk_prob": "False",
        "rope_type": "default",
        "tie_word_embeddings": "False",
        "windows": "none",
    },
    "qwen2": {
        "head_dim": "other usual",
        "hidden_act": "silu",
        "rope_type": "default yarn",
        "tie_word_embeddings": "False True",
        "windows": "all none some",
    },
    "qwen3": {
        "attention_bias": "False",
        "head_dim": "other",
        "hidden_act": "gelu silu",
        "rope_type": "default linear yarn",
        "tie_word_embeddings": "False True",
        "windows": "none some",
    },
    "qwen3_moe": {
        "attention_bias": "False",
        "head_dim": "other",
        "hidden_act": "silu",
        "norm_topk_prob": "False True",
        "num_experts_per_tok": "1 n",
        "rope_type": "default yarn",
        "tie_word_embeddings": "False True",
        "topk_group": "all",
        "windows": "all none",
    },
}


def unproved(config: Any) -> list[str]:
    """Return what of a config no comparison has covered, as `key=class`. Empty if all was.

    Args:
        config: The Hugging Face config.
    """
    config = rope_scaling.own_config(config)
    if config.model_type not in PROVED:
        return [f"model_type={config.model_type}"]
    proved = PROVED[config.model_type]
    return [f"{key}={kind}" for key, kind in traits(config) if kind not in proved.get(key, NUMBER).split()]


def traits(config: Any) -> Iterator[tuple[str, str]]:
    """Give what a comparison of a config covers: each key that means something, with the class of its value."""
    keys = FAMILIES[config.model_type]
    for key in (*keys.same, *keys.opposite, *keys.products, *keys.only, *keys.never, "hidden_act"):
        if hasattr(config, key) and key not in ("sliding_window", "topk_group"):
            yield key, _class(getattr(config, key))
    for key, value in rope_scaling.rope_parameters(config).items():
        if value is not None and key != "type":
            yield key, _class(value)
    windows = {bool(each) for each in rope_scaling.windows(config)}
    yield "windows", "some" if len(windows) != 1 else "all" if True in windows else "none"
    if hasattr(config, "topk_group"):
        yield "topk_group", "all" if getattr(config, "n_group", None) in (None, config.topk_group) else "some"
    if getattr(config, "kv_lora_rank", None):
        return  # latent attention has head sizes of its own
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    yield "groups", "all" if groups == heads else _class(groups)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    yield "head_dim", "usual" if size * heads == config.hidden_size else "other"


def _class(value: Any) -> str:
    if isinstance(value, (bool, str)) or value is None or value in (0, 1):
        return str(int(value) if isinstance(value, float) else value)
    if isinstance(value, (int, float)) and not 0 < value < math.inf:
        return str(value)
    return NUMBER
