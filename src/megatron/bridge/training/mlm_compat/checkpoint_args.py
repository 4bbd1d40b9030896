# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's view of a Bridge model: the ``args`` of a checkpoint.

Megatron-LM rebuilds a model from ``state_dict["args"]`` (``load_args_from_checkpoint`` and
``check_checkpoint_args`` in megatron/training/checkpointing.py, core 0.15 to 0.19). It does not read every
architecture field from there; megatron/bridge_cli/launch_flags.py knows which must stand on its command line.
"""

import logging
import os
from argparse import Namespace
from typing import Any

from megatron.core import dist_checkpointing

from megatron.bridge.training import untrusted_checkpoint
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.bridge_cli.launch_flags import megatron_lm_flags as megatron_lm_flags


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


def read_megatron_lm_args(checkpoint: str | os.PathLike) -> Namespace:
    """Read the Megatron-LM args of a checkpoint.

    Args:
        checkpoint: Checkpoint root or payload folder.

    Returns:
        The args in its common state.

    Raises:
        KeyError: The checkpoint has no args, as what Bridge imported before release checkpoints.
        ValueError: The checkpoint names a class that none needs, or its metadata is damaged.
    """
    from megatron.bridge.training.release_checkpoint import resolve_checkpoint

    payload = resolve_checkpoint(checkpoint)
    with untrusted_checkpoint.reading(payload):
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
