# SPDX-License-Identifier: Apache-2.0
"""The command line with which Megatron-LM builds the model of a checkpoint, from the checkpoint's args."""

import logging
import os
from argparse import Namespace
from typing import Any

from megatron.bridge.release_checkpoint.args import NEVER_READ, READ


logger = logging.getLogger(__name__)

_NO_FLAGS = "No flags of pretrain_gpt.py give this model, Megatron Bridge trains it: %s"

# What providers build with code of their own, by the beginning of their names.
_OWN_CODE = {
    "Gemma": "Gemma's scaled embeddings and its gated GELU",
    "OlMoE": "OLMoE's norms over the queries and keys of all heads",
}
# The module that builds Megatron Core's hybrid models.
_HYBRID = "models.hybrid."
_ACTIVATIONS = ("gated silu", "gated quick_gelu", "gelu", "silu", "squared_relu", "quick_gelu")

# Fields whose flags take several values as separate words. Other lists are one word.
_SPREAD = {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}

# Fields that have no flag, with the value that Megatron-LM uses (MLATransformerConfig, core 0.19).
_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

# GPTModel's default, which gpt_builders.py and gpt_config_from_args of core 0.19 don't change.
BUILT_ROPE_SCALING_FACTOR = 8.0


def megatron_lm_flags(args: Namespace, *, use_checkpoint_args: bool = False) -> list[str]:
    """Return the Megatron-LM command line that builds the model of a checkpoint.

    If no command line does (`unsaid`), a warning says so, and the words are those of the nearest model.

    Args:
        args: Args of a checkpoint.
        use_checkpoint_args: Leave out what ``--use-checkpoint-args`` makes Megatron-LM take from the checkpoint.
            False gives every flag.

    Returns:
        The words of the command line, flags and values, for ``pretrain_gpt.py`` of core 0.17 to 0.19.
    """
    words = ["--use-checkpoint-args"] if use_checkpoint_args else []
    for arg in NEVER_READ if use_checkpoint_args else (*READ, *NEVER_READ):
        value, flag = getattr(args, arg.name, None), arg.flag or f"--{arg.name.replace('_', '-')}"
        only_with = arg.only_with or ("num_experts" if arg.name.startswith("moe_") else None)
        if only_with and not getattr(args, only_with, None):
            continue
        if arg.when == "value" and value not in (None, arg.default):
            words += [flag, *_words(arg.name, value)]
        elif arg.when in ("true", "switch") and value is True or arg.when == "false" and value is False:
            words.append(flag)
        elif arg.when == "switch" and value is False:
            words.append(flag.replace("--", "--no-", 1))
    for what in unsaid(args):
        logger.warning(_NO_FLAGS, what)
    return words


def launch_lines(root: str | os.PathLike, args: Namespace) -> list[str]:
    """Return the lines that tell how Megatron-LM starts from a checkpoint, or what of the model it has no flags for.

    Args:
        root: Checkpoint root.
        args: Its args.
    """
    if found := unsaid(args):
        return [_NO_FLAGS % "; ".join(found)]
    short = " ".join(["--load", str(root), *megatron_lm_flags(args, use_checkpoint_args=True)])
    return [
        f"Megatron-LM starts from this checkpoint with: {short}",
        f"Without --use-checkpoint-args it needs: {' '.join(megatron_lm_flags(args))}",
    ]


def unsaid(args: Namespace) -> list[str]:
    """Return what of a model no command line gives to Megatron-LM, nothing for most models.

    Args:
        args: Args of a checkpoint.
    """
    provider, activation = (str(getattr(args, f"bridge_{what}", "")) for what in ("provider", "activation"))
    found = [what for family, what in _OWN_CODE.items() if provider.startswith(family)]
    code = getattr(args, "bridge_code", None) or ""
    if code.startswith(_HYBRID):
        found.append(
            "it has Mamba layers, Megatron-LM's pretrain_hybrid.py takes their pattern and sizes from the args"
        )
    elif code and not found:
        found.append(f"it is made of {code}, and a recipe takes the release as checkpoint.pretrained_checkpoint")
    if activation and activation not in _ACTIVATIONS and not found:
        found.append(f"the activation {activation}")
    if getattr(args, "multi_latent_attention", False):
        if getattr(args, "qk_layernorm", False) and getattr(args, "q_lora_rank", None) is None:
            found.append(
                "without --q-lora-rank, core 0.19 puts a norm in front of the query; core 0.18 builds this model"
            )
        for name, fixed in _FIXED.items():
            if getattr(args, name, fixed) != fixed:
                found.append(f"there is no flag for {name}={getattr(args, name)}, Megatron-LM uses {fixed}")
    if isinstance(factor := getattr(args, "rotary_seq_len_interpolation_factor", None), float):
        found.append(
            f"--rotary-seq-len-interpolation-factor takes whole numbers, the model has {factor}: pass "
            "seq_len_interpolation_factor to GPTModel in gpt_builders.py"
        )
    if drops_rope_scaling_factor(args):
        found.append(
            f"Megatron-LM up to core 0.19 builds RoPE scaling with factor {BUILT_ROPE_SCALING_FACTOR} and drops "
            f"--rope-scaling-factor {args.rope_scaling_factor}: pass rope_scaling_factor to GPTModel in "
            "gpt_builders.py"
        )
    return found


def drops_rope_scaling_factor(args: Namespace) -> bool:
    """Return whether Megatron-LM builds RoPE scaling with another factor than its args have."""
    factor = getattr(args, "rope_scaling_factor", None)
    return getattr(args, "use_rope_scaling", False) and factor not in (None, BUILT_ROPE_SCALING_FACTOR)


def _words(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [str(value)]
    if name in _SPREAD:
        return [str(item) for item in value]
    items = ",".join(str(item) for item in value)
    return [items] if name == "window_size" else [f"[{items}]"]
