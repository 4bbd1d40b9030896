# SPDX-License-Identifier: Apache-2.0
"""Families that convert in a process with the layout of Transformer Engine's modules.

On a host without Transformer Engine or without an accelerator, Megatron Core's own layers make the models of
`OWN_LAYERS`. The other families of Bridge ask for modules of Transformer Engine, FLA, mamba-ssm, or causal-conv1d by
name, or for CUDA while they are built. Their conversions run in a process of their own, which has stand-ins for these
(host/stand_ins.py).
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from megatron.core.extensions.transformer_engine import HAVE_TE
from transformers import PretrainedConfig

from megatron.bridge.host import accelerator, own_process, stand_ins
from megatron.bridge.models.conversion.families import FAMILIES


__all__ = ["OWN_LAYERS", "in_layout_process", "needs_layout"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

OWN_LAYERS = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("BailingMoeV2", "DeepseekV2", "DeepseekV3", "Gemma", "Glm4Moe", "Glm4MoeLite", "GptOss", "HYV3", "KimiK2"),
        *("Llama", "Mistral", "Nemotron", "Olmoe", "Qwen2", "Qwen3", "Qwen3Moe", "SarvamMoE"),
    )
)
"""Architectures whose models Megatron Core's own layers make, bit for bit."""
_TO_FIND_A_CONFIG = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def needs_layout(config: dict[str, Any]) -> bool:
    """Return whether a Hugging Face config is of a family, or a variant, that its own layers can't make.

    Args:
        config: The content of config.json.
    """
    # Core's own latent attention has no norm to fuse without a compressed query, and its own layers have no mapping
    # for HYV3's prediction layers.
    beyond = config.get("q_lora_rank", 0) is None
    predicts = bool(config.get("num_nextn_predict_layers"))
    return any(
        name not in OWN_LAYERS or beyond or (predicts and name.startswith("HYV3"))
        for name in config.get("architectures") or ()
        if name in FAMILIES
    )


def in_layout_process(convert: Callable[P, T]) -> Callable[P, T]:
    """Decorates `AutoBridge.import_ckpt` and `export_ckpt`, to run in a process of its own where that is needed."""

    @functools.wraps(convert)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        has_all = HAVE_TE and accelerator.is_available()
        if has_all or stand_ins.are_installed() or not needs_layout(_config_of(convert, args, kwargs)):
            return convert(*args, **kwargs)
        logger.info("converted in a process with the layout of Transformer Engine's modules")
        return own_process.run(convert, args, kwargs)

    return wrapper


def _config_of(convert: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the config of what is converted. It is empty if it can't be read: the conversion says why."""
    try:
        given = inspect.signature(convert).bind(*args, **kwargs).arguments
        if "hf_model_id" not in given:
            hf_pretrained = given["self"].hf_pretrained
            return getattr(hf_pretrained, "config", hf_pretrained).to_dict()
        options = {name: value for name, value in kwargs.items() if name in _TO_FIND_A_CONFIG}
        return PretrainedConfig.get_config_dict(given["hf_model_id"], **options)[0]
    except Exception:
        logger.debug("no config was found before the conversion", exc_info=True)
        return {}
