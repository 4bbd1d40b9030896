# SPDX-License-Identifier: Apache-2.0
"""The command line with which Megatron-LM builds the model of a checkpoint, from the checkpoint's args.

`--use-checkpoint-args` makes Megatron-LM take fields from there (`load_args_from_checkpoint` in
megatron/training/checkpointing.py, core 0.15 to 0.19), but not every field that describes a model; those that it
leaves out must stand on its command line. The table below is that knowledge, once. It needs no torch, which the
command line of Bridge starts without.
"""

import logging
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal


logger = logging.getLogger(__name__)


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


def megatron_lm_flags(args: Namespace, *, use_checkpoint_args: bool = False) -> list[str]:
    """Return the Megatron-LM command line that builds the model of a checkpoint.

    Args:
        args: Args of a checkpoint, from ``megatron_lm_args`` or ``read_megatron_lm_args``.
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
    factor = getattr(args, "rope_scaling_factor", None)
    if getattr(args, "use_rope_scaling", False) and factor not in (None, _BUILT_ROPE_SCALING_FACTOR):
        logger.warning(
            "pretrain_gpt.py of Megatron-LM up to core 0.19 builds RoPE scaling with factor %s and drops "
            "--rope-scaling-factor %s: pass rope_scaling_factor to GPTModel in its gpt_builders.py",
            _BUILT_ROPE_SCALING_FACTOR,
            factor,
        )
    precision = next((flag for flag in ("fp16", "bf16") if getattr(args, flag, False)), None)
    return [*words, f"--{precision}"] if precision else words


def _words(arg: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [str(value)]
    if arg in _SPREAD:
        return [str(item) for item in value]
    items = ",".join(str(item) for item in value)
    return [items] if arg == "window_size" else [f"[{items}]"]
