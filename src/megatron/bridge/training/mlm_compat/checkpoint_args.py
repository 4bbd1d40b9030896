# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's view of a Bridge model: the ``args`` of a checkpoint, and the command line that builds the same model.

Megatron-LM rebuilds a model from ``state_dict["args"]`` (``load_args_from_checkpoint`` and
``check_checkpoint_args`` in megatron/training/checkpointing.py, core 0.15 to 0.19). It does not read every
architecture field from there; those that it leaves out must stand on its command line. The tables below are that
knowledge, once.
"""

import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core import dist_checkpointing

from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size


logger = logging.getLogger(__name__)

# Fields whose name and meaning are the same in Bridge's model providers and in Megatron-LM's args.
_SAME = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "seq_length",
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "add_bias_linear",
    "add_qkv_bias",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "attention_dropout",
    "hidden_dropout",
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "qk_layernorm",
    "qk_l2_norm",
    "window_size",
    "window_attn_skip_freq",
    "softmax_type",
    "no_rope_freq",
    "rope_scaling_factor",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_latent_size",
    "mtp_use_repeated_layer",
    "mtp_hybrid_override_pattern",
    "hybrid_layer_pattern",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "make_vocab_size_divisible_by",
    "fp16",
    "bf16",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
]

# A release checkpoint as Megatron-LM's bookkeeping sees it (load_checkpoint, core 0.19): no training has happened.
_RELEASE = {
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


@dataclass(frozen=True)
class _Flag:
    """A Megatron-LM command-line flag.

    Attributes:
        name: The flag.
        arg: The field of the args that it stands for.
        when: "value" gives the flag with the field's value, "true" and "false" give a switch.
        read: Megatron-LM takes the field from a checkpoint under ``--use-checkpoint-args``.
        only_with: A field without which the flag means nothing.
        default: Megatron-LM's default; the flag is left out where the model has it.
    """

    name: str
    arg: str
    when: Literal["value", "true", "false"] = "value"
    read: bool = True
    only_with: str | None = None
    default: Any = None


def _never_read(name: str, arg: str, when: Literal["value", "true", "false"] = "value", **kwargs: Any) -> _Flag:
    return _Flag(name, arg, when, read=False, **kwargs)


_FLAGS = (
    _Flag("--num-layers", "num_layers"),
    _Flag("--hidden-size", "hidden_size"),
    _Flag("--ffn-hidden-size", "ffn_hidden_size"),
    _Flag("--num-attention-heads", "num_attention_heads"),
    _Flag("--group-query-attention", "group_query_attention", "true"),
    _Flag("--num-query-groups", "num_query_groups", only_with="group_query_attention"),
    _Flag("--kv-channels", "kv_channels"),
    _Flag("--seq-length", "seq_length"),
    _Flag("--max-position-embeddings", "max_position_embeddings"),
    _Flag("--padded-vocab-size", "padded_vocab_size"),
    _Flag("--position-embedding-type", "position_embedding_type"),
    _Flag("--rotary-base", "rotary_base"),
    _Flag("--rotary-percent", "rotary_percent"),
    _Flag("--rotary-interleaved", "rotary_interleaved", "true"),
    _Flag("--disable-bias-linear", "add_bias_linear", "false"),
    _Flag("--add-qkv-bias", "add_qkv_bias", "true"),
    _Flag("--swiglu", "swiglu", "true"),
    _Flag("--squared-relu", "squared_relu", "true"),
    _Flag("--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", "true"),
    _Flag("--normalization", "normalization"),
    _Flag("--apply-query-key-layer-scaling", "apply_query_key_layer_scaling", "true"),
    _Flag("--attention-dropout", "attention_dropout"),
    _Flag("--hidden-dropout", "hidden_dropout"),
    _Flag("--num-experts", "num_experts"),
    _Flag("--moe-ffn-hidden-size", "moe_ffn_hidden_size", only_with="num_experts"),
    _Flag("--moe-layer-freq", "moe_layer_freq", only_with="num_experts"),
    _Flag("--moe-router-topk", "moe_router_topk", only_with="num_experts"),
    _Flag("--moe-router-pre-softmax", "moe_router_pre_softmax", "true", only_with="num_experts"),
    _Flag("--moe-router-score-function", "moe_router_score_function", only_with="num_experts"),
    _Flag("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias", "true", only_with="num_experts"),
    _Flag("--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor", only_with="num_experts"),
    _Flag("--moe-shared-expert-intermediate-size", "moe_shared_expert_intermediate_size", only_with="num_experts"),
    _Flag("--moe-latent-size", "moe_latent_size", only_with="num_experts"),
    _Flag("--mtp-num-layers", "mtp_num_layers"),
    # From here on Megatron-LM never reads the field from a checkpoint. Of apply_layernorm_1p it reads the old name
    # alone, which its config stopped using when the flag's destination became layernorm_zero_centered_gamma.
    _never_read("--norm-epsilon", "layernorm_epsilon"),
    _never_read("--apply-layernorm-1p", "layernorm_zero_centered_gamma", "true"),
    _never_read("--qk-layernorm", "qk_layernorm", "true"),
    _never_read("--qk-l2-norm", "qk_l2_norm", "true"),
    _never_read("--attention-softmax-in-fp32", "attention_softmax_in_fp32", "true"),
    _never_read("--window-size", "window_size"),
    _never_read("--window-attn-skip-freq", "window_attn_skip_freq"),
    _never_read("--softmax-type", "softmax_type", default="vanilla"),
    _never_read("--no-rope-freq", "no_rope_freq"),
    _never_read("--quick-geglu", "quick_geglu", "true"),
    _never_read("--use-rope-scaling", "use_rope_scaling", "true"),
    _never_read("--rope-scaling-factor", "rope_scaling_factor", only_with="use_rope_scaling"),
    _never_read("--multi-latent-attention", "multi_latent_attention", "true"),
    _never_read("--q-lora-rank", "q_lora_rank", only_with="multi_latent_attention"),
    _never_read("--kv-lora-rank", "kv_lora_rank", only_with="multi_latent_attention"),
    _never_read("--qk-head-dim", "qk_head_dim", only_with="multi_latent_attention"),
    _never_read("--qk-pos-emb-head-dim", "qk_pos_emb_head_dim", only_with="multi_latent_attention"),
    _never_read("--v-head-dim", "v_head_dim", only_with="multi_latent_attention"),
    _never_read("--rope-type", "rope_type", only_with="multi_latent_attention"),
    _never_read("--rotary-scaling-factor", "rotary_scaling_factor"),
    _never_read("--mscale", "mscale"),
    _never_read("--mscale-all-dim", "mscale_all_dim"),
    _never_read("--yarn-original-max-position-embeddings", "yarn_original_max_position_embeddings"),
    _never_read("--yarn-beta-fast", "yarn_beta_fast"),
    _never_read("--yarn-beta-slow", "yarn_beta_slow"),
    _never_read("--yarn-correction-range-round-to-int", "yarn_correction_range_round_to_int", "true"),
    _never_read("--no-yarn-correction-range-round-to-int", "yarn_correction_range_round_to_int", "false"),
    _never_read("--moe-router-num-groups", "moe_router_num_groups", only_with="num_experts"),
    _never_read("--moe-router-group-topk", "moe_router_group_topk", only_with="num_experts"),
    _never_read("--moe-router-dtype", "moe_router_dtype", only_with="num_experts"),
    _never_read(
        "--moe-router-load-balancing-type",
        "moe_router_load_balancing_type",
        only_with="num_experts",
        default="aux_loss",
    ),
    _never_read("--moe-aux-loss-coeff", "moe_aux_loss_coeff", only_with="num_experts", default=0.0),
    _never_read("--moe-shared-expert-gate", "moe_shared_expert_gate", "true", only_with="num_experts"),
)

# Flags that take several values as several words; elsewhere a list is one word.
_SPREAD = {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}

# Fields that Megatron-LM has no flag for, with the value that it uses (MLATransformerConfig, core 0.19).
_WITHOUT_FLAG = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

# GPTModel's default, which gpt_builders.py and gpt_config_from_args of core 0.19 leave as it is.
_BUILT_ROPE_SCALING_FACTOR = 8.0


def megatron_lm_args(model_config: Any) -> Namespace:
    """Return the ``args`` that Megatron-LM expects in a checkpoint of this model.

    Left out on purpose are ``tokenizer_type`` and ``tokenizer_model``, which ``load_args_from_checkpoint`` would force
    over the user's ``--tokenizer-type SFTTokenizer``, and ``moe_grouped_gemm`` and ``moe_token_dispatcher_type``,
    which are choices of the platform that trains and not of the model.

    Args:
        model_config: A model provider of Bridge, finalized.

    Returns:
        A namespace of ints, floats, strings, bools, None and lists of them, so that
        ``torch.load(weights_only=True)`` reads it.
    """
    activation = getattr(model_config.activation_func, "__name__", str(model_config.activation_func))
    is_mla = bool(getattr(model_config, "multi_latent_attention", False))
    groups = model_config.num_query_groups or model_config.num_attention_heads
    is_moe = bool(model_config.num_moe_experts)
    values = {name: getattr(model_config, name, None) for name in _SAME}
    values |= {
        "num_query_groups": groups,
        "group_query_attention": groups != model_config.num_attention_heads and not is_mla,
        "max_position_embeddings": getattr(model_config, "seq_length", None),
        "rotary_base": _whole(getattr(model_config, "rotary_base", None)),
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "use_rope_scaling": bool(getattr(model_config, "rope_scaling", False)),
        "swiglu": activation == "silu" and model_config.gated_linear_unit,
        "squared_relu": activation == "squared_relu",
        "quick_geglu": activation == "quick_gelu" and model_config.gated_linear_unit,
        "apply_layernorm_1p": model_config.layernorm_zero_centered_gamma,
        "norm_epsilon": model_config.layernorm_epsilon,
        "untie_embeddings_and_output_weights": not getattr(model_config, "share_embeddings_and_output_weights", True),
        "num_experts": model_config.num_moe_experts or None,
        "moe_ffn_hidden_size": model_config.moe_ffn_hidden_size if is_moe else None,
        "mtp_num_layers": model_config.mtp_num_layers or None,
        "padded_vocab_size": _padded_vocab_size(model_config),
        "world_size": _model_parallel_ranks(model_config),
    }
    if values["position_embedding_type"] == "yarn":
        # Megatron-LM's flags drop the prefix (_apply_yarn_config_from_args, core 0.19).
        unprefixed = {"rotary_scaling_factor": "yarn_rotary_scaling_factor"}
        unprefixed |= {name: f"yarn_{name}" for name in ("mscale", "mscale_all_dim")}
        values |= {name: getattr(model_config, field, None) for name, field in unprefixed.items()}
    elif not is_mla:
        values |= dict.fromkeys(("rotary_scaling_factor", "mscale", "mscale_all_dim"))
    if activation not in ("gelu", "silu", "squared_relu", "quick_gelu") or (
        model_config.gated_linear_unit and not (values["swiglu"] or values["quick_geglu"])
    ):
        gated = "gated " if model_config.gated_linear_unit else ""
        logger.warning("Megatron-LM has no flag for the activation %s%s: its model will differ", gated, activation)
    return Namespace(**{name: _plain(value) for name, value in (values | _RELEASE).items()})


def megatron_lm_flags(args: Namespace, *, use_checkpoint_args: bool = False) -> list[str]:
    """Return the Megatron-LM command line that builds the model of a checkpoint.

    Args:
        args: Args of a checkpoint, from :func:`megatron_lm_args` or :func:`read_megatron_lm_args`.
        use_checkpoint_args: Leave out what ``--use-checkpoint-args`` makes Megatron-LM take from the checkpoint
            itself. False gives every flag.

    Returns:
        The words of the command line, flags and values, for ``pretrain_gpt.py`` of core 0.17 to 0.19.
    """
    words = ["--use-checkpoint-args"] if use_checkpoint_args else []
    for flag in _FLAGS:
        value = getattr(args, flag.arg, None)
        if use_checkpoint_args and flag.read or flag.only_with and not getattr(args, flag.only_with, None):
            continue
        if flag.when == "value" and value not in (None, flag.default):
            words += [flag.name, *_words(flag.arg, value)]
        elif flag.when == "true" and value is True or flag.when == "false" and value is False:
            words.append(flag.name)
    if getattr(args, "multi_latent_attention", False):
        for name, fixed in _WITHOUT_FLAG.items():
            if getattr(args, name, fixed) != fixed:
                logger.warning("Megatron-LM has no flag for %s=%s and uses %s", name, getattr(args, name), fixed)
    if getattr(args, "use_rope_scaling", False) and args.rope_scaling_factor != _BUILT_ROPE_SCALING_FACTOR:
        logger.warning(
            "pretrain_gpt.py of Megatron-LM up to core 0.19 builds RoPE scaling with factor %s and drops "
            "--rope-scaling-factor %s: pass rope_scaling_factor to GPTModel in its gpt_builders.py",
            _BUILT_ROPE_SCALING_FACTOR,
            args.rope_scaling_factor,
        )
    precision = next((flag for flag in ("fp16", "bf16") if getattr(args, flag, False)), None)
    return [*words, f"--{precision}"] if precision else words


def read_megatron_lm_args(checkpoint: str | os.PathLike) -> Namespace:
    """Read the Megatron-LM args of a checkpoint.

    Args:
        checkpoint: Checkpoint root or payload folder.

    Returns:
        The args in its common state.

    Raises:
        KeyError: The checkpoint has no args, as upstream's imports before release checkpoints.
    """
    from megatron.bridge.training.release_checkpoint import resolve_checkpoint

    payload = resolve_checkpoint(checkpoint)
    common = dist_checkpointing.load_common_state_dict(payload)
    if "args" not in common:
        raise KeyError(
            f"{payload} holds no Megatron-LM args: import the model again, or use import_ckpt(release=True)"
        )
    return common["args"]


def _padded_vocab_size(model_config: Any) -> int | None:
    """Return the number of rows of the embedding that this provider builds."""
    vocab_size = getattr(model_config, "vocab_size", None)
    if vocab_size is None or not getattr(model_config, "should_pad_vocab", False):
        return vocab_size
    return calculate_padded_vocab_size(
        vocab_size, model_config.make_vocab_size_divisible_by, model_config.tensor_model_parallel_size
    )


def _model_parallel_ranks(model_config: Any) -> int:
    return model_config.tensor_model_parallel_size * model_config.pipeline_model_parallel_size


def _whole(value: float | None) -> float | int | None:
    """Return a whole float as an int: ``--rotary-base`` takes no other."""
    return int(value) if value is not None and float(value).is_integer() else value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _words(arg: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [str(value)]
    if arg in _SPREAD:
        return [str(item) for item in value]
    items = ",".join(str(item) for item in value)
    return [items] if arg == "window_size" else [f"[{items}]"]
