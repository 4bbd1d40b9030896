# SPDX-License-Identifier: Apache-2.0
"""Families that convert in a process with the layout of Transformer Engine's modules.

On a host without Transformer Engine or without an accelerator, Megatron Core's own layers make the models of some
families bit for bit (`family_results.EXACT`). The others ask for modules of Transformer Engine, FLA, mamba-ssm, or
causal-conv1d by name, or for CUDA while they are built. They convert in a process that has stand-ins for these
(host/stand_ins.py): the process of the command itself, or one that a script's process starts.
"""

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from transformers import PretrainedConfig

from megatron.bridge.host import own_process, stand_ins
from megatron.bridge.models.conversion.family_results import EXACT, RESULTS


__all__ = ["in_layout_process", "install_for", "needs_layout"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_TO_FIND_A_CONFIG = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def needs_layout(config: dict[str, Any]) -> bool:
    """Return whether a Hugging Face config is of a family, or a variant, that Megatron Core's own layers can't make.

    Args:
        config: The content of config.json.
    """
    # Core's own layers have no mapping for HYV3's prediction layers.
    predicts = bool(config.get("num_nextn_predict_layers"))
    return any(
        RESULTS[name] != EXACT or (predicts and name.startswith("HYV3"))
        for name in config.get("architectures") or ()
        if name in RESULTS
    )


def install_for(source: str | os.PathLike) -> None:
    """Install the stand-ins in this process, a command's, if the model needs them and Megatron Core isn't imported.

    Args:
        source: The Hugging Face model.
    """
    if "megatron.core" not in sys.modules and stand_ins.are_needed() and needs_layout(_read(source)):
        stand_ins.install()


def in_layout_process(convert: Callable[P, T]) -> Callable[P, T]:
    """Decorates `AutoBridge.import_ckpt` and `export_ckpt`, to run in a process of its own where that is needed."""

    @functools.wraps(convert)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        is_ready = stand_ins.are_installed() or not stand_ins.are_needed()
        if is_ready or not needs_layout(_config_of(convert, args, kwargs)):
            return convert(*args, **kwargs)
        logger.info("converted in a process with the layout of Transformer Engine's modules")
        return own_process.run(convert, args, kwargs)

    return wrapper


def _config_of(convert: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        given = inspect.signature(convert).bind(*args, **kwargs).arguments
    except TypeError:  # which the conversion raises
        return {}
    if "hf_model_id" in given:
        return _read(given["hf_model_id"], **kwargs)
    hf_pretrained = given["self"].hf_pretrained
    return getattr(hf_pretrained, "config", hf_pretrained).to_dict()


def _read(source: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Return the config of a model. It is empty if it can't be read: the conversion says why."""
    try:
        found = {name: value for name, value in options.items() if name in _TO_FIND_A_CONFIG}
        return PretrainedConfig.get_config_dict(source, **found)[0]
    except Exception:
        logger.debug("no config was found before the conversion", exc_info=True)
        return {}
