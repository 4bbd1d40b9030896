# SPDX-License-Identifier: Apache-2.0
"""The command line with which Megatron-LM builds the model of a checkpoint, from the checkpoint's args."""

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.bridge.release_checkpoint.args import NEVER_READ, READ


logger = logging.getLogger(__name__)

# Fields whose flags take several values as separate words. Other lists are one word.
_SPREAD = {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}

# Fields that have no flag, with the value that Megatron-LM uses (MLATransformerConfig, core 0.19).
_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

# GPTModel's default, which gpt_builders.py and gpt_config_from_args of core 0.19 don't change.
_BUILT_ROPE_SCALING_FACTOR = 8.0


def megatron_lm_flags(args: Namespace, *, use_checkpoint_args: bool = False) -> list[str]:
    """Return the Megatron-LM command line that builds the model of a checkpoint.

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
    for line in unsaid(args):
        logger.warning(line)
    return words


def launch_lines(root: str | os.PathLike, args: Namespace) -> list[str]:
    """Return the lines that tell how Megatron-LM starts from a checkpoint.

    Args:
        root: Checkpoint root.
        args: Its args.
    """
    short = " ".join(["--load", str(root), *megatron_lm_flags(args, use_checkpoint_args=True)])
    return [
        f"Megatron-LM starts from this checkpoint with: {short}",
        f"Without --use-checkpoint-args it needs: {' '.join(megatron_lm_flags(args))}",
    ]


def unsaid(args: Namespace) -> Iterator[str]:
    """Give the values of a model that no command line gives to Megatron-LM, a line each."""
    if getattr(args, "multi_latent_attention", False):
        for name, fixed in _FIXED.items():
            if getattr(args, name, fixed) != fixed:
                yield f"Megatron-LM has no flag for {name}={getattr(args, name)} and uses {fixed}"
    if isinstance(factor := getattr(args, "rotary_seq_len_interpolation_factor", None), float):
        yield (
            f"Megatron-LM's --rotary-seq-len-interpolation-factor takes whole numbers, the model has {factor}: pass "
            "seq_len_interpolation_factor to GPTModel in its gpt_builders.py"
        )
    factor = getattr(args, "rope_scaling_factor", None)
    if getattr(args, "use_rope_scaling", False) and factor not in (None, _BUILT_ROPE_SCALING_FACTOR):
        yield (
            f"pretrain_gpt.py of Megatron-LM up to core 0.19 builds RoPE scaling with factor "
            f"{_BUILT_ROPE_SCALING_FACTOR} and drops --rope-scaling-factor {factor}: pass rope_scaling_factor to "
            "GPTModel in its gpt_builders.py"
        )


def _words(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        return [str(value)]
    if name in _SPREAD:
        return [str(item) for item in value]
    items = ",".join(str(item) for item in value)
    return [items] if name == "window_size" else [f"[{items}]"]
