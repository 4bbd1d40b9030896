# SPDX-License-Identifier: Apache-2.0
"""Variants of the families that convert: what config.json says otherwise, and what an import makes of it.

Megatron-LM is the judge, started with the flags that the import prints (`judge.py`). *same*: its logits are
transformers'. *refused* and *said*: the import ends with these words, or says them, where no flags give the model.
"""

from dataclasses import dataclass, field
from typing import Any

import torch


SAME = "same"


@dataclass(frozen=True)
class Variant:
    """A row of the matrix.

    Attributes:
        name: Family and what is changed.
        family: Of `models.CONVERTED`.
        changes: Values of the config that go before the family's own.
        expected: "same", or "refused: WORDS" or "said: WORDS" with a part of the error or of a warning.
        default: Whether the default command runs it.
    """

    name: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    expected: str = SAME
    default: bool = False


def rope(kind: str, base: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    """Return the change of a config that scales RoPE."""
    return {"rope_parameters": {"rope_theta": base, "rope_type": kind, **scaling}}


def yarn(factor: float = 4.0, original: int = 32, **scaling: Any) -> dict[str, Any]:
    """Return the change of a config that scales RoPE by YaRN, from a length that the judge's tokens exceed."""
    return rope("yarn", factor=factor, original_max_position_embeddings=original, **scaling)


def llama3(factor: float = 8.0, low: float = 1.0, high: float = 4.0, original: int = 8192) -> dict[str, Any]:
    """Return the change of a config that scales RoPE as Llama 3.1 does."""
    factors = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return rope("llama3", 500000.0, **factors, original_max_position_embeddings=original)


LONGROPE = rope(
    "longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=32, factor=4.0
)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
DEEPSEEK_YARN = {"mscale": 1.0, "mscale_all_dim": 1.0}

OTHER_ROPE = "refused: has other frequencies than Bridge's model"
BY_LENGTH = "refused: which changes with the length of the text"
BIAS = "refused: attention_bias is True, expected False"
MLP_BIAS = "refused: mlp_bias is True, expected False"
NORMALIZED = "refused: norm_topk_prob is False, expected True"
GATED_GELU = "said: No flags of pretrain_gpt.py give this model, Megatron Bridge trains it: the activation gated gelu"
OLMOE_CODE = "said: Megatron Bridge trains it: it is made of models.olmoe.olmoe_provider"
NO_MLP_BIAS = "refused: attention_bias is True, Bridge's model has False"
UNTIED = "refused: tie_word_embeddings is True, Bridge's model has False"
NORMS = "refused: rms_norm_eps is 0.01, which Bridge's latent attention uses, but not transformers'"
MIXED_LAYERS = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
OTHER_LAYERS = (
    "refused: layers with experts is [False, True, False, True], Bridge's model has [False, True, True, True]"
)
OTHER_GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
RATED = "refused: Bridge's model rates each of 4 groups by its best 1, transformers by its best 2"
# Megatron Core's own error, before anything is written.
TOP_1 = "refused: Please use --moe-router-pre-softmax when topk is 1"


def _rows(family: str, *rows: tuple[Any, ...]) -> list[Variant]:
    return [Variant(f"{family}: {name}", family, *rest) for name, *rest in rows]


VARIANTS = [
    *_rows(
        "llama-3",
        ("as it is",),
        ("theta", rope("default", 1234.5)),
        ("linear", rope("linear", factor=4.0), SAME, True),
        ("linear, factor 2.5", rope("linear", factor=2.5), "said: --rotary-seq-len-interpolation-factor takes whole"),
        ("dynamic", rope("dynamic", factor=4.0), BY_LENGTH, True),
        ("longrope", LONGROPE, BY_LENGTH),
        ("yarn", yarn()),
        ("yarn, truncate", yarn(truncate=False)),
        ("yarn, truncate null", yarn(truncate=None)),
        ("yarn, attention factor", yarn(attention_factor=1.0), SAME, True),
        ("yarn, betas", yarn(beta_fast=16.0, beta_slow=2.0)),
        ("yarn, both mscales", yarn(mscale=1.0, mscale_all_dim=0.5)),
        ("yarn, mscale alone", yarn(mscale=0.7)),
        ("yarn, mscale_all_dim alone", yarn(mscale_all_dim=0.7)),
        ("yarn, factor 1", yarn(1.0)),
        ("yarn, original length beside it", rope("yarn", factor=4.0) | {"original_max_position_embeddings": 32}),
        ("llama3", llama3()),
        ("llama3, original", llama3(original=32), OTHER_ROPE, True),
        ("llama3, low", llama3(low=2.0), OTHER_ROPE),
        ("llama3, high", llama3(high=8.0), OTHER_ROPE),
        ("llama3, factor 32", llama3(32.0), "said: builds RoPE scaling with factor 8.0", True),
        (
            "attention_bias",
            {"attention_bias": True},
            "refused: attention_bias is True, Bridge's model has False",
            True,
        ),
        ("mlp_bias", {"mlp_bias": True}, "refused: attention_bias is False, Bridge's model has True"),
        ("both biases", {"attention_bias": True, "mlp_bias": True}, SAME, True),
        ("gelu", {"hidden_act": "gelu"}, GATED_GELU),
        ("swish", {"hidden_act": "swish"}, "refused: Unsupported activation function: swish"),
        ("tied", {"tie_word_embeddings": True}),
        ("head_dim", {"head_dim": 32}),
        ("one KV head", {"num_key_value_heads": 1}),
        ("as many KV heads", {"num_key_value_heads": 4}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
        ("pretraining_tp", {"pretraining_tp": 2}),
        ("vocabulary of 391", {"vocab_size": 391}),
        ("partial rotary, which Llama doesn't read", rope("default", partial_rotary_factor=0.5)),
        ("attention dropout", {"attention_dropout": 0.1}),
        ("a window, which Llama doesn't read", {"sliding_window": 8, "layer_types": WINDOWS}, SAME, True),
        ("not causal", {"is_causal": False}, "refused: is_causal is False, expected True"),
        ("a vendor's key", {"unsloth_fixed": True}),
    ),
    *_rows(
        "mistral",
        ("window", {"sliding_window": 8}),
        ("yarn", yarn(), SAME, True),
        ("use_sliding_window, which Mistral doesn't read", {"sliding_window": 8, "use_sliding_window": False}),
        ("layer types", {"sliding_window": 8, "layer_types": WINDOWS}),
        ("window of 0", {"sliding_window": 0}, "refused: sliding_window is 0, expected another value"),
        ("linear", rope("linear", factor=4.0)),
        ("llama3", llama3()),
        ("llama3, original", llama3(original=32), OTHER_ROPE),
        ("head_dim", {"head_dim": 32}),
        ("gelu", {"hidden_act": "gelu"}, "refused: hidden_act is 'gelu', Bridge's model has silu"),
        ("tied", {"tie_word_embeddings": True}),
        ("one KV head", {"num_key_value_heads": 1}),
        ("vocabulary of 391", {"vocab_size": 391}),
    ),
    *_rows(
        "qwen2",
        ("as it is",),
        ("windows", WINDOWED | {"max_window_layers": 0}),
        ("windows from a layer on", WINDOWED | {"max_window_layers": 1}, SAME, True),
        ("layer types", WINDOWED | {"layer_types": WINDOWS}),
        ("window that isn't used", {"use_sliding_window": False, "sliding_window": 8}),
        ("yarn", yarn()),
        ("dynamic", rope("dynamic", factor=4.0), BY_LENGTH),
        ("tied", {"tie_word_embeddings": True}),
        ("head_dim", {"head_dim": 32}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
    ),
    *_rows(
        "qwen3",
        ("attention_bias", {"attention_bias": True}, BIAS, True),
        ("windows", WINDOWED | {"max_window_layers": 2}),
        ("linear", rope("linear", factor=4.0)),
        ("yarn", yarn()),
        ("tied", {"tie_word_embeddings": True}),
        ("gelu", {"hidden_act": "gelu"}, GATED_GELU),
        ("linear attention", {"layer_types": ["linear_attention"] * 4}, "refused: layer_types has 'linear_attention'"),
    ),
    *_rows(
        "qwen3-moe",
        ("as it is",),
        ("decoder_sparse_step", {"decoder_sparse_step": 2}, SAME, True),
        ("mlp_only_layers", {"mlp_only_layers": [1]}),
        ("no experts", {"mlp_only_layers": [0, 1, 2, 3]}),
        ("no norm_topk_prob", {"norm_topk_prob": False}),
        ("windows", WINDOWED),
        ("windows in all layers", WINDOWED | {"max_window_layers": 2, "layer_types": WINDOWS}),
        ("scoring_func", {"scoring_func": "sigmoid"}, "refused: scoring_func is 'sigmoid', expected 'softmax'"),
        ("scaling factor", {"routed_scaling_factor": 2.5}, "refused: routed_scaling_factor is 2.5, expected 1.0"),
        ("groups", {"n_group": 2, "topk_group": 1}, "refused: n_group is 2, expected 1"),
        ("groups to choose, without groups", {"topk_group": 1}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
        ("attention_bias", {"attention_bias": True}, BIAS),
        ("one expert", {"num_experts_per_tok": 1}, TOP_1),
        ("one expert, no norm_topk_prob", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ("yarn", yarn()),
        ("tied", {"tie_word_embeddings": True}),
        ("first_k_dense_replace, which it doesn't read", {"first_k_dense_replace": 2}),
    ),
    *_rows(
        "deepseek-v2",
        ("as it is",),
        ("norm_topk_prob", {"norm_topk_prob": True}, "refused: norm_topk_prob is True, expected False"),
        ("scaling factor", {"routed_scaling_factor": 16.0}),
        ("yarn, mscale", yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), "said: transformers doesn't"),
        ("yarn", yarn(40.0, 4096)),
        ("attention_bias", {"attention_bias": True}, BIAS),
        ("three dense layers", {"first_k_dense_replace": 3}),
        (
            "groups that aren't used",
            {"n_group": 2, "topk_group": 1},
            "refused: topk_method is 'greedy', Bridge's model",
        ),
        ("moe_layer_freq, which transformers doesn't read", {"moe_layer_freq": 2}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}, NORMS),
    ),
    *_rows(
        "deepseek-v3",
        ("as it is",),
        ("yarn", yarn(40.0, 4096, **DEEPSEEK_YARN)),
        ("yarn, original length", yarn(40.0, 32, **DEEPSEEK_YARN), "said: no flag for original_max_position_emb"),
        ("yarn, mscale", yarn(40.0, 4096, mscale=0.707, mscale_all_dim=1.0)),
        ("yarn, no mscale", yarn(40.0, 4096)),
        ("yarn, mscale alone", yarn(40.0, 4096, mscale=0.707), "refused: multiplies by"),
        ("yarn, attention factor", yarn(40.0, 4096, attention_factor=1.5), "refused: multiplies by"),
        ("yarn, truncate", yarn(40.0, 4096, truncate=False, **DEEPSEEK_YARN), OTHER_ROPE),
        ("yarn, betas", yarn(40.0, 4096, beta_fast=16, **DEEPSEEK_YARN), "said: no flag for beta_fast=16"),
        ("linear", rope("linear", factor=4.0), OTHER_ROPE),
        ("groups", {"n_group": 2, "topk_group": 1}),
        ("no norm_topk_prob", {"norm_topk_prob": False}, NORMALIZED, True),
        ("more groups", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
        ("groups, three experts", OTHER_GROUPS, RATED),
        ("no dense layers", {"first_k_dense_replace": 0}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}, NORMS),
        ("one expert", {"num_experts_per_tok": 1}, "refused: num_experts_per_tok is 1"),
        ("rope_interleave", {"rope_interleave": False}, "refused: rope_interleave is False, expected True"),
        ("attention_bias", {"attention_bias": True}, BIAS),
        ("dense layers alone", {"first_k_dense_replace": 4}),
        ("tied", {"tie_word_embeddings": True}, UNTIED),
        ("two shared experts", {"n_shared_experts": 2}),
        ("head sizes", {"v_head_dim": 32, "qk_nope_head_dim": 24}),
        ("scaling factor", {"routed_scaling_factor": 1.0}),
        ("scaling factor 0", {"routed_scaling_factor": 0.0}, "refused: routed_scaling_factor is 0.0"),
        ("none of the groups", {"topk_group": 0}, "refused: topk_group is 0, expected another value"),
        ("layer kinds of Qwen3, which it doesn't read", {"decoder_sparse_step": 2, "mlp_only_layers": [2]}),
    ),
    *_rows(
        "gpt-oss",
        ("as it is", {}, SAME, True),
        ("window", {"sliding_window": 8}),
        ("layer types", {"layer_types": WINDOWS, "sliding_window": 8}, SAME, True),
        ("yarn", yarn(truncate=False)),
        ("yarn, truncate", yarn(truncate=True)),
        ("plain RoPE", rope("default", 150000.0)),
        ("swiglu_limit", {"swiglu_limit": 1.0}, "refused: swiglu_limit is 1.0, expected 7.0"),
        ("no attention_bias", {"attention_bias": False}, "refused: attention_bias is False, expected True"),
        ("tied", {"tie_word_embeddings": True}, UNTIED),
        ("one expert", {"num_experts_per_tok": 1}, TOP_1),
        ("scoring_func", {"scoring_func": "sigmoid"}, "refused: scoring_func is 'sigmoid', expected 'softmax'"),
        ("hidden_act, which it doesn't read", {"hidden_act": "gelu"}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
        ("head_dim", {"head_dim": 32}),
        ("as many KV heads", {"num_key_value_heads": 4}),
        ("all experts", {"num_experts_per_tok": 4}),
        ("one KV head", {"num_key_value_heads": 1}),
    ),
    *_rows(
        "glm-4.5",
        ("as it is",),
        ("attention_bias", {"attention_bias": True}),
        ("use_qk_norm", {"use_qk_norm": True}),
        ("no norm_topk_prob", {"norm_topk_prob": False}, NORMALIZED),
        ("scaling factor", {"routed_scaling_factor": 2.5}),
        ("groups", {"n_group": 2, "topk_group": 1}),
        ("groups, three experts", OTHER_GROUPS, RATED),
        ("gelu", {"hidden_act": "gelu"}, GATED_GELU),
        ("two shared experts", {"n_shared_experts": 2}, "refused: n_shared_experts x moe_intermediate_size is 64"),
        ("yarn", yarn(partial_rotary_factor=0.5), "refused: turns 8 dimensions, Bridge's model 16"),
        ("linear", rope("linear", factor=4.0, partial_rotary_factor=0.5)),
        ("whole rotary", rope("default", partial_rotary_factor=1.0), SAME, True),
        ("partial_rotary_factor of its own", {"partial_rotary_factor": 0.25}),
        ("attention_bias and use_qk_norm", {"attention_bias": True, "use_qk_norm": True}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
        ("head_dim", {"head_dim": 32}),
        ("one KV head", {"num_key_value_heads": 1}),
        ("as many KV heads", {"num_key_value_heads": 4}),
        ("no dense layers", {"first_k_dense_replace": 0}),
        ("no shared expert", {"n_shared_experts": 0}, "refused: n_shared_experts x moe_intermediate_size is 0"),
        ("one expert", {"num_experts_per_tok": 1}, "refused: num_experts_per_tok is 1"),
        ("tied", {"tie_word_embeddings": True}, UNTIED),
    ),
    *_rows(
        "gemma",
        ("as it is", {}, "said: trains it: Gemma's scaled embeddings"),
        ("gelu", {"hidden_act": "gelu"}, "said: Gemma was trained with gelu_pytorch_tanh"),
        ("silu", {"hidden_act": "silu"}, "said: trains it: Gemma's scaled embeddings"),
        ("an activation without a function", {"hidden_act": "gelu_new"}, "refused: Unsupported activation function"),
        ("untied", {"tie_word_embeddings": False}, "refused: tie_word_embeddings is False, Bridge's model has True"),
        ("attention_bias", {"attention_bias": True}, BIAS),
    ),
    *_rows(
        "glm-4-moe-lite",
        ("as it is",),
        ("yarn", yarn(40.0, 4096)),
        ("groups", {"n_group": 2, "topk_group": 1}),
        ("scaling factor", {"routed_scaling_factor": 2.5}),
        ("two shared experts", {"n_shared_experts": 2}),
        ("kinds of layers", MIXED_LAYERS, OTHER_LAYERS),
        ("norm epsilon", {"rms_norm_eps": 1e-2}, NORMS),
    ),
    *_rows(
        "hy-v3",
        ("as it is",),
        ("yarn", yarn()),
        ("scaling factor", {"router_scaling_factor": 2.5}),
        ("two shared experts", {"num_shared_experts": 2}),
        ("tied", {"tie_word_embeddings": True}),
        ("kinds of layers", MIXED_LAYERS, OTHER_LAYERS),
        ("switches that transformers doesn't read", {"route_norm": False, "qk_norm": False}),
        ("norm epsilon", {"rms_norm_eps": 1e-2}),
    ),
    *_rows(
        "olmoe",
        ("as it is", {}, OLMOE_CODE),
        ("clip_qkv", {"clip_qkv": 0.5}, "refused: clip_qkv is 0.5, expected None"),
        ("norm_topk_prob", {"norm_topk_prob": True}, "refused: norm_topk_prob is True, Bridge's model has False"),
        ("attention_bias", {"attention_bias": True}, BIAS),
        ("half as many KV heads", {"num_key_value_heads": 2}, OLMOE_CODE),
    ),
    *_rows(
        "nemotron",
        ("as it is",),
        ("attention_bias", {"attention_bias": True}, BIAS),
        ("mlp_bias", {"mlp_bias": True}, MLP_BIAS),
        ("silu", {"hidden_act": "silu"}, "refused: hidden_act is 'silu', Bridge's model has squared_relu"),
        ("whole rotary", rope("default", partial_rotary_factor=1.0)),
        ("linear", rope("linear", factor=4.0, partial_rotary_factor=0.5)),
        ("norm epsilon", {"norm_eps": 1e-2}),
        (
            "another family's norm epsilon",
            {"rms_norm_eps": 1e-2},
            "refused: norm_eps is 1e-05, Bridge's model has 0.01",
        ),
        ("head_dim", {"head_dim": 32}),
        ("one KV head", {"num_key_value_heads": 1}),
        ("gelu", {"hidden_act": "gelu"}, "refused: hidden_act is 'gelu', Bridge's model has squared_relu"),
        ("yarn", yarn(partial_rotary_factor=0.5), "refused: turns 8 dimensions, Bridge's model 16"),
        ("tied", {"tie_word_embeddings": True}),
    ),
]


def sharpen(model: torch.nn.Module) -> None:
    """Make the weights tell: peaked attention, in which a wrong position shows, and routers that decide by a margin.

    With the usual initialisation even a wrong RoPE factor moves the logits by 0.3 %. Values are those of bf16, which
    some families are converted to.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")):
                parameter.mul_(2.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(1.5)
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
            if name.endswith(("mlp.gate.weight", "router.weight")):
                parameter.mul_(10)
            parameter.copy_(parameter.bfloat16())
