# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's ``args`` of a Bridge model: one table of args, command-line flags and config fields.

Megatron-LM rebuilds a model from ``state_dict["args"]`` (``load_args_from_checkpoint`` and ``check_checkpoint_args``,
megatron/training/checkpointing.py, core 0.15 to 0.19). It does not read every architecture field from there. Fields
that it leaves out must stand on its command line.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal


@dataclass(frozen=True)
class Arg:
    """One of Megatron-LM's args.

    Attributes:
        name: The field of the args.
        value: The field of Bridge's model config, or a function of the config. Default: the field of the same name.
        flag: The command-line flag. Default: the name with dashes.
        when: "value" gives the flag with the field's value. "true" and "false" give the bare flag for that value,
            "switch" gives it for true and its ``--no-`` form for false.
        only_with: A field without which the flag has no meaning. Fields of "moe_" have none without "num_experts".
        default: Megatron-LM's default. The flag is left out if the model has that value.
    """

    name: str
    value: str | Callable[[Any], Any] | None = None
    flag: str | None = None
    when: Literal["value", "true", "false", "switch"] = "value"
    only_with: str | None = None
    default: Any = None

    def of(self, config: Any) -> Any:
        """Return the value for a model config of Bridge; None for a field that the config does not have."""
        return self.value(config) if callable(self.value) else getattr(config, self.value or self.name, None)


def _true(name: str, value: Callable[[Any], Any] | None = None, flag: str | None = None) -> Arg:
    return Arg(name, value, flag, "true")


def _all(*names: str, only_with: str | None = None) -> list[Arg]:
    return [Arg(name, only_with=only_with) for name in names]


def _activation(config: Any) -> str:
    return getattr(config.activation_func, "__name__", str(config.activation_func))


def _gated(activation: str) -> Callable[[Any], bool]:
    return lambda config: _activation(config) == activation and bool(config.gated_linear_unit)


def _query_groups(config: Any) -> int:
    return config.num_query_groups or config.num_attention_heads


def _is_grouped(config: Any) -> bool:
    return _query_groups(config) != config.num_attention_heads and not getattr(config, "multi_latent_attention", False)


def _whole(field: str, config: Any) -> Any:
    # Some flags take whole numbers only. Gemma 3 has a pair of rotary bases: local attention's and global attention's.
    value = getattr(config, field, None)
    return int(value) if isinstance(value, (int, float)) and float(value).is_integer() else value


def _embedding_rows(config: Any) -> int | None:
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None or not getattr(config, "should_pad_vocab", False):
        return vocab_size
    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def _scaling(name: str, config: Any) -> Any:
    # Megatron-LM's flags drop the prefix of the fields of YaRN (_apply_yarn_config_from_args, core 0.19).
    if getattr(config, "position_embedding_type", None) == "yarn":
        return getattr(config, f"yarn_{name}", None)
    return getattr(config, name, None) if getattr(config, "multi_latent_attention", False) else None


def _code(config: Any) -> str | None:
    """Return the module below megatron.bridge, or the attention, that Megatron-LM's GPT doesn't have."""
    spec = getattr(config, "transformer_layer_spec", None)
    parts = filter(callable, (getattr(type(config), "provide", None), getattr(spec, "func", spec)))
    modules = {getattr(each, "__module__", "").partition("megatron.bridge.")[2] for each in parts}
    return min(modules - {"", "models.gpt_provider"}, default=getattr(config, "experimental_attention_variant", None))


# ``--use-checkpoint-args`` takes these from a checkpoint.
READ = (
    *_all("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    _true("group_query_attention", _is_grouped),
    Arg("num_query_groups", _query_groups, only_with="group_query_attention"),
    *_all("kv_channels", "seq_length"),
    Arg("max_position_embeddings", "seq_length"),
    Arg("padded_vocab_size", _embedding_rows),
    Arg("position_embedding_type"),
    Arg("rotary_base", partial(_whole, "rotary_base")),
    Arg("rotary_percent"),
    _true("rotary_interleaved"),
    Arg("add_bias_linear", flag="--disable-bias-linear", when="false"),
    _true("add_qkv_bias"),
    _true("swiglu", _gated("silu")),
    _true("squared_relu", lambda config: _activation(config) == "squared_relu"),
    _true(
        "untie_embeddings_and_output_weights",
        lambda config: not getattr(config, "share_embeddings_and_output_weights", True),
    ),
    Arg("normalization"),
    _true("apply_query_key_layer_scaling"),
    *_all("attention_dropout", "hidden_dropout"),
    Arg("num_experts", lambda config: config.num_moe_experts or None),
    Arg("moe_ffn_hidden_size", lambda config: config.moe_ffn_hidden_size if config.num_moe_experts else None),
    *_all("moe_layer_freq", "moe_router_topk"),
    _true("moe_router_pre_softmax"),
    Arg("moe_router_score_function"),
    _true("moe_router_enable_expert_bias"),
    *_all("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size", "moe_latent_size"),
    Arg("mtp_num_layers", lambda config: config.mtp_num_layers or None),
)

# It never takes these. Instead of layernorm_zero_centered_gamma it reads the old name, apply_layernorm_1p, which
# Megatron-LM's config no longer uses.
NEVER_READ = (
    Arg("layernorm_epsilon", flag="--norm-epsilon"),
    _true("layernorm_zero_centered_gamma", flag="--apply-layernorm-1p"),
    *map(_true, ("qk_layernorm", "qk_l2_norm", "attention_softmax_in_fp32")),
    *_all("window_size", "window_attn_skip_freq", "no_rope_freq", "activation_func_clamp_value"),
    Arg("softmax_type", default="vanilla"),
    _true("quick_geglu", _gated("quick_gelu")),
    Arg("glu_linear_offset", default=0.0),
    Arg("rotary_seq_len_interpolation_factor", partial(_whole, "seq_len_interpolation_factor")),
    _true("use_rope_scaling", lambda config: bool(getattr(config, "rope_scaling", False))),
    Arg("rope_scaling_factor", only_with="use_rope_scaling"),
    _true("multi_latent_attention"),
    *_all(
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
        only_with="multi_latent_attention",
    ),
    *(Arg(name, partial(_scaling, name)) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")),
    *_all("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    Arg("yarn_correction_range_round_to_int", when="switch"),
    *_all("moe_router_num_groups", "moe_router_group_topk", "moe_router_dtype"),
    Arg("moe_router_load_balancing_type", default="aux_loss"),
    Arg("moe_aux_loss_coeff", default=0.0),
    _true("moe_shared_expert_gate"),
    *map(_true, ("fp16", "bf16")),
)

# These have no flag, or one that a training chooses for itself.
_WITHOUT_FLAG = (
    Arg("norm_epsilon", "layernorm_epsilon"),
    Arg("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    Arg("add_position_embedding", lambda config: True),
    Arg("use_rotary_position_embeddings", lambda config: False),
    *_all("original_max_position_embeddings", "beta_fast", "beta_slow", "heterogeneous_layers_config_encoded_json"),
    *_all("mtp_use_repeated_layer", "mtp_hybrid_override_pattern", "hybrid_layer_pattern"),
    *_all("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "make_vocab_size_divisible_by"),
    *_all("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    Arg("expert_model_parallel_size"),
    Arg("bridge_provider", lambda config: type(config).__name__),
    Arg("bridge_code", _code),
    Arg("bridge_activation", lambda config: "gated " * bool(config.gated_linear_unit) + _activation(config)),
    Arg("world_size", lambda config: config.tensor_model_parallel_size * config.pipeline_model_parallel_size),
)

# What Megatron-LM's bookkeeping reads from a release checkpoint (load_checkpoint, core 0.19): nothing was trained yet.
_UNTRAINED = {
    **dict.fromkeys(("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0),
    **dict.fromkeys(("no_save_optim", "no_save_rng", "use_dist_ckpt"), True),
    **dict.fromkeys(("data_parallel_random_init", "use_distributed_optimizer"), False),
    "ckpt_format": "torch_dist",
    "data_parallel_size": 1,
}


def megatron_lm_args(config: Any) -> Namespace:
    """Return the ``args`` that Megatron-LM expects in a checkpoint of this model.

    They are plain values, which ``torch.load(weights_only=True)`` reads. Two kinds are left out: the tokenizer, which
    ``load_args_from_checkpoint`` would force over the user's, and what depends on the platform that trains
    (``moe_grouped_gemm``, ``moe_token_dispatcher_type``).

    Args:
        config: A finalized model provider of Bridge.
    """
    values = {arg.name: arg.of(config) for arg in (*READ, *NEVER_READ, *_WITHOUT_FLAG)} | _UNTRAINED
    return Namespace(**{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
