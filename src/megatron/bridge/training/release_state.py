# SPDX-License-Identifier: Apache-2.0
"""How ``save_checkpoint`` writes a release checkpoint: weights and Megatron-LM's args, without training state."""

import functools
from collections.abc import Callable
from typing import Any

from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.training.release_writer import ReleaseWriter
from megatron.bridge.training.utils.checkpoint_utils import get_checkpoint_run_config_filename


# Megatron-LM starts a release at iteration 0 with its own optimizer, scheduler and random numbers (load_checkpoint in
# megatron/training/checkpointing.py, core 0.19).
_TRAINING_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")


def writes_releases(open_writer: Callable[..., ReleaseWriter]) -> Callable[[Callable], Callable]:
    """Decorate ``save_checkpoint``, so that it gets a ``writer`` with ``release=True``, which discards on an error.

    Args:
        open_writer: Takes the checkpoint root, and whether the writer publishes after the call.
    """

    def decorate(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(save_checkpoint)
        def save(state: Any, *args: Any, release: bool = False, **kwargs: Any) -> None:
            if not release:
                return save_checkpoint(state, *args, **kwargs)
            target = state.cfg.checkpoint
            with open_writer(target.save, deferred=target.async_save) as writer:
                return save_checkpoint(state, *args, writer=writer, **kwargs)

        return save

    return decorate


def release_state_dict(state_dict: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Return a state dict without training state, at iteration 0, and with the args of the model of a config."""
    weights = {key: value for key, value in state_dict.items() if key not in _TRAINING_STATE}
    # Below version 2.0 Megatron-LM permutes the QKV weights on load (fix_query_key_value_ordering).
    return {**weights, "args": megatron_lm_args(cfg.model), "checkpoint_version": 3.0, "iteration": 0}


def complete_payload(payload: str, cfg: Any) -> None:
    """Write run config and tokenizer into a payload, once every rank has written its weights."""
    # These import this module.
    from megatron.bridge.training.checkpointing import save_tokenizer_assets
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    cfg.to_yaml(get_checkpoint_run_config_filename(payload))
    tokenizer = getattr(cfg.dataset, "tokenizer", None)
    if tokenizer is None and cfg.tokenizer is not None:
        tokenizer = build_tokenizer(cfg.tokenizer)
    if tokenizer is not None:
        save_tokenizer_assets(tokenizer, cfg.tokenizer, payload)
