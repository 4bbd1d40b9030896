# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's ``args`` of a Bridge model: one table of args, command-line flags and config fields.

Megatron-LM rebuilds a model from ``state_dict["args"]`` (``load_args_from_checkpoint`` and ``check_checkpoint_args``,
megatron/training/checkpointing.py, core 0.15 to 0.19). It does not read every architecture field from there. Fields
that it leaves out must stand on its command line.
"""

import logging
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arg:
    """One of Megatron-LM's args.

    Attributes:
        name: The field of the args.
        flag: The command-line flag, None if there is none.
        when: "value" gives the flag with the field's value. "true" and "false" give the bare flag for that value,
            "switch" gives it for true and its ``--no-`` form for false.
        value: The field of Bridge's model config, or a function of the config. Default: the field called `name`.
        read: Whether Megatron-LM takes the field from a checkpoint under ``--use-checkpoint-args``.
        only_with: A field without which the flag has no meaning.
        default: Megatron-LM's default. The flag is left out if the model has that value.
    """

    name: str
    flag: str | None = None
    when: Literal["value", "true", "false", "switch"] = "value"
    value: str | Callable[[Any], Any] | None = None
    read: bool = True
    only_with: str | None = None
    default: Any = None

    def of(self, config: Any) -> Any:
        """Return the value for a model config of Bridge; None for a field that the config does not have."""
        return self.value(config) if callable(self.value) else getattr(config, self.value or self.name, None)


def _never_read(name: str, flag: str, when: str = "value", **kwargs: Any) -> Arg:
    return Arg(name, flag, when, read=False, **kwargs)


def _of_mla(name: str, flag: str) -> Arg:
    return _never_read(name, flag, only_with="multi_latent_attention")


def _of_moe(name: str, flag: str, when: str = "value", **kwargs: Any) -> Arg:
    return Arg(name, flag, when, only_with="num_experts", **kwargs)


def _activation(config: Any) -> str:
    return getattr(config.activation_func, "__name__", str(config.activation_func))


def _gated(activation: str) -> Callable[[Any], bool]:
    return lambda config: _activation(config) == activation and bool(config.gated_linear_unit)


def _query_groups(config: Any) -> int:
    return config.num_query_groups or config.num_attention_heads


def _is_grouped(config: Any) -> bool:
    return _query_groups(config) != config.num_attention_heads and not getattr(config, "multi_latent_attention", False)


def _rotary_base(config: Any) -> float | int | None:
    """``--rotary-base`` takes whole numbers only."""
    base = getattr(config, "rotary_base", None)
    return int(base) if base is not None and float(base).is_integer() else base


def _padded_vocab_size(config: Any) -> int | None:
    """Return the number of rows of the embedding that this config builds."""
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None or not getattr(config, "should_pad_vocab", False):
        return vocab_size
    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def _yarn(field: str) -> Callable[[Any], Any]:
    """Megatron-LM's flags drop the prefix of the fields of YaRN (_apply_yarn_config_from_args, core 0.19)."""

    def value(config: Any) -> Any:
        if getattr(config, "position_embedding_type", None) == "yarn":
            return getattr(config, f"yarn_{field}", None)
        return getattr(config, field, None) if getattr(config, "multi_latent_attention", False) else None

    return value


ARGS = (
    Arg("num_layers", "--num-layers"),
    Arg("hidden_size", "--hidden-size"),
    Arg("ffn_hidden_size", "--ffn-hidden-size"),
    Arg("num_attention_heads", "--num-attention-heads"),
    Arg("group_query_attention", "--group-query-attention", "true", _is_grouped),
    Arg("num_query_groups", "--num-query-groups", value=_query_groups, only_with="group_query_attention"),
    Arg("kv_channels", "--kv-channels"),
    Arg("seq_length", "--seq-length"),
    Arg("max_position_embeddings", "--max-position-embeddings", value="seq_length"),
    Arg("padded_vocab_size", "--padded-vocab-size", value=_padded_vocab_size),
    Arg("position_embedding_type", "--position-embedding-type"),
    Arg("rotary_base", "--rotary-base", value=_rotary_base),
    Arg("rotary_percent", "--rotary-percent"),
    Arg("rotary_interleaved", "--rotary-interleaved", "true"),
    Arg("add_bias_linear", "--disable-bias-linear", "false"),
    Arg("add_qkv_bias", "--add-qkv-bias", "true"),
    Arg("swiglu", "--swiglu", "true", _gated("silu")),
    Arg("squared_relu", "--squared-relu", "true", lambda config: _activation(config) == "squared_relu"),
    Arg(
        "untie_embeddings_and_output_weights",
        "--untie-embeddings-and-output-weights",
        "true",
        lambda config: not getattr(config, "share_embeddings_and_output_weights", True),
    ),
    Arg("normalization", "--normalization"),
    Arg("apply_query_key_layer_scaling", "--apply-query-key-layer-scaling", "true"),
    Arg("attention_dropout", "--attention-dropout"),
    Arg("hidden_dropout", "--hidden-dropout"),
    Arg("num_experts", "--num-experts", value=lambda config: config.num_moe_experts or None),
    _of_moe(
        "moe_ffn_hidden_size",
        "--moe-ffn-hidden-size",
        value=lambda config: config.moe_ffn_hidden_size if config.num_moe_experts else None,
    ),
    _of_moe("moe_layer_freq", "--moe-layer-freq"),
    _of_moe("moe_router_topk", "--moe-router-topk"),
    _of_moe("moe_router_pre_softmax", "--moe-router-pre-softmax", "true"),
    _of_moe("moe_router_score_function", "--moe-router-score-function"),
    _of_moe("moe_router_enable_expert_bias", "--moe-router-enable-expert-bias", "true"),
    _of_moe("moe_router_topk_scaling_factor", "--moe-router-topk-scaling-factor"),
    _of_moe("moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size"),
    _of_moe("moe_latent_size", "--moe-latent-size"),
    Arg("mtp_num_layers", "--mtp-num-layers", value=lambda config: config.mtp_num_layers or None),
    # Megatron-LM never reads the fields below from a checkpoint. Instead of layernorm_zero_centered_gamma it reads the
    # old name, apply_layernorm_1p, which its config no longer uses.
    _never_read("layernorm_epsilon", "--norm-epsilon"),
    _never_read("layernorm_zero_centered_gamma", "--apply-layernorm-1p", "true"),
    _never_read("qk_layernorm", "--qk-layernorm", "true"),
    _never_read("qk_l2_norm", "--qk-l2-norm", "true"),
    _never_read("attention_softmax_in_fp32", "--attention-softmax-in-fp32", "true"),
    _never_read("window_size", "--window-size"),
    _never_read("window_attn_skip_freq", "--window-attn-skip-freq"),
    _never_read("softmax_type", "--softmax-type", default="vanilla"),
    _never_read("no_rope_freq", "--no-rope-freq"),
    _never_read("quick_geglu", "--quick-geglu", "true", value=_gated("quick_gelu")),
    _never_read(
        "use_rope_scaling",
        "--use-rope-scaling",
        "true",
        value=lambda config: bool(getattr(config, "rope_scaling", False)),
    ),
    _never_read("rope_scaling_factor", "--rope-scaling-factor", only_with="use_rope_scaling"),
    _never_read("multi_latent_attention", "--multi-latent-attention", "true"),
    _of_mla("q_lora_rank", "--q-lora-rank"),
    _of_mla("kv_lora_rank", "--kv-lora-rank"),
    _of_mla("qk_head_dim", "--qk-head-dim"),
    _of_mla("qk_pos_emb_head_dim", "--qk-pos-emb-head-dim"),
    _of_mla("v_head_dim", "--v-head-dim"),
    _of_mla("rope_type", "--rope-type"),
    _never_read("rotary_scaling_factor", "--rotary-scaling-factor", value=_yarn("rotary_scaling_factor")),
    _never_read("mscale", "--mscale", value=_yarn("mscale")),
    _never_read("mscale_all_dim", "--mscale-all-dim", value=_yarn("mscale_all_dim")),
    _never_read("yarn_original_max_position_embeddings", "--yarn-original-max-position-embeddings"),
    _never_read("yarn_beta_fast", "--yarn-beta-fast"),
    _never_read("yarn_beta_slow", "--yarn-beta-slow"),
    _never_read("yarn_correction_range_round_to_int", "--yarn-correction-range-round-to-int", "switch"),
    _of_moe("moe_router_num_groups", "--moe-router-num-groups", read=False),
    _of_moe("moe_router_group_topk", "--moe-router-group-topk", read=False),
    _of_moe("moe_router_dtype", "--moe-router-dtype", read=False),
    _of_moe("moe_router_load_balancing_type", "--moe-router-load-balancing-type", read=False, default="aux_loss"),
    _of_moe("moe_aux_loss_coeff", "--moe-aux-loss-coeff", read=False, default=0.0),
    _of_moe("moe_shared_expert_gate", "--moe-shared-expert-gate", "true", read=False),
    _never_read("fp16", "--fp16", "true"),
    _never_read("bf16", "--bf16", "true"),
    # Without a flag, or with one that a training chooses for itself.
    Arg("norm_epsilon", value="layernorm_epsilon"),
    Arg("apply_layernorm_1p", value="layernorm_zero_centered_gamma"),
    Arg("add_position_embedding", value=lambda config: True),
    Arg("use_rotary_position_embeddings", value=lambda config: False),
    Arg("original_max_position_embeddings"),
    Arg("beta_fast"),
    Arg("beta_slow"),
    Arg("mtp_use_repeated_layer"),
    Arg("mtp_hybrid_override_pattern"),
    Arg("hybrid_layer_pattern"),
    Arg("mamba_state_dim"),
    Arg("mamba_head_dim"),
    Arg("mamba_num_groups"),
    Arg("mamba_num_heads"),
    Arg("make_vocab_size_divisible_by"),
    Arg("tensor_model_parallel_size"),
    Arg("pipeline_model_parallel_size"),
    Arg("virtual_pipeline_model_parallel_size"),
    Arg("expert_model_parallel_size"),
    Arg("world_size", value=lambda config: config.tensor_model_parallel_size * config.pipeline_model_parallel_size),
)

# What Megatron-LM's bookkeeping reads from a release checkpoint (load_checkpoint, core 0.19): nothing was trained yet.
_UNTRAINED = {
    "iteration": 0,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
    "no_save_optim": True,
    "no_save_rng": True,
    "data_parallel_random_init": False,
    "use_distributed_optimizer": False,
    "ckpt_format": "torch_dist",
    "use_dist_ckpt": True,
    "data_parallel_size": 1,
}


def megatron_lm_args(config: Any) -> Namespace:
    """Return the ``args`` that Megatron-LM expects in a checkpoint of this model.

    Left out on purpose are ``tokenizer_type`` and ``tokenizer_model``, which ``load_args_from_checkpoint`` would force
    over the user's ``--tokenizer-type SFTTokenizer``, and ``moe_grouped_gemm`` and ``moe_token_dispatcher_type``,
    which depend on the platform that trains and not on the model.

    Args:
        config: A finalized model provider of Bridge.

    Returns:
        A namespace of ints, floats, strings, bools, None and lists of them, so that
        ``torch.load(weights_only=True)`` reads it.
    """
    values = {arg.name: arg.of(config) for arg in ARGS} | _UNTRAINED
    activation, gated = _activation(config), config.gated_linear_unit
    known = ("silu", "quick_gelu") if gated else ("gelu", "silu", "squared_relu", "quick_gelu")
    if activation not in known:
        logger.warning(
            "Megatron-LM has no flag for the activation %s%s: its model will differ",
            "gated " if gated else "",
            activation,
        )
    return Namespace(**{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
