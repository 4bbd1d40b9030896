# SPDX-License-Identifier: Apache-2.0
"""Finds a tensor under the name that a checkpoint has for it, where that isn't the one that a bridge knows.

A model has one spelling of its names on the hub, and often another one when transformers saves it again: some have a
prefix more or less, some are renamed. transformers reads all of them by its own table. Two names that it takes for the
same parameter are the same tensor here, as are those of embeddings and head where they are tied.
"""

import copy
import functools
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from packaging.version import Version


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping


__all__ = ["with_stored_names"]

Mapping = TypeVar("Mapping", bound="MegatronParamMapping | None")

logger = logging.getLogger(__name__)


def with_stored_names(mapping: Mapping, hf_pretrained: Any, stored: Collection[str] | None) -> Mapping:
    """Return a mapping of a parameter with the names that a checkpoint has for its tensors.

    Args:
        mapping: The mapping, without wildcards. None if the bridge has none.
        hf_pretrained: The checkpoint.
        stored: The names of its tensors. None for a config without a checkpoint.

    Returns:
        The mapping itself if the checkpoint has its names, or doesn't have all of its tensors under any name.
    """
    if mapping is None or stored is None or mapping.allow_hf_name_mismatch:
        return mapping
    names = mapping.hf_param if isinstance(mapping.hf_param, dict) else {"": mapping.hf_param}
    if all(name in stored for name in names.values()):
        return mapping
    others = _names_by_place(hf_pretrained, stored)
    found = {part: here for part, name in names.items() if (here := name if name in stored else others(name))}
    if len(found) < len(names):
        return mapping
    result = copy.copy(mapping)
    result.hf_param = found if isinstance(mapping.hf_param, dict) else found[""]
    return result


def _names_by_place(hf_pretrained: Any, stored: Collection[str]) -> Callable[[str], str | None]:
    """Return a function that finds the stored name of a parameter by any of its names. The checkpoint keeps it."""
    kept = vars(hf_pretrained).setdefault("_stored_names", {})
    if "find" not in kept:
        place = _place_of(hf_pretrained.config)
        by_place = {place(name): name for name in stored} if place else {}
        kept["find"] = lambda name: by_place.get(place(name)) if place else None
    return kept["find"]


def _place_of(config: Any) -> Callable[[str], str] | None:
    """Return a function from any name of a parameter to transformers' name. None if transformers has no such model."""
    names = getattr(config, "architectures", None) or [""]
    model_class = getattr(transformers, names[0], None)
    if model_class is None or Version(transformers.__version__).major < 5:
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        with torch.device("meta"):
            model = model_class(config)
        renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        renamed = functools.partial(
            _renamed, rename_source_key, renamings, model.base_model_prefix, dict.fromkeys(model.state_dict(), True)
        )
        # If a checkpoint has only one of two tied parameters, transformers takes it for both.
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return lambda name: tied.get(place := renamed(name), place)
    except Exception as error:  # whatever a model raises on the meta device
        logger.debug("transformers' names of %s are not known: %s", names[0], error)
        return None


def _renamed(rename: Callable, renamings: list[Any], prefix: str, parameters: dict[str, bool], name: str) -> str:
    # As `convert_and_load_state_dict_in_model` of transformers 5 does.
    renamed, _ = rename(name, renamings, [], prefix, parameters)
    if renamed not in parameters and name in parameters:
        renamed, _ = rename(name, [], [], prefix, parameters)
    return renamed
