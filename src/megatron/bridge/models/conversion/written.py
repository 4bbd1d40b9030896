# SPDX-License-Identifier: Apache-2.0
"""The last check of an import: what is about to be written was read, or is a value that a module makes."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron.bridge.models.conversion.accounting import CONSTRUCTED
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.release_checkpoint import proof


def check_written(state_dict: Mapping[str, Any]) -> None:
    """Check the tensors of the models in a state dict, on this rank. Does nothing if no import runs.

    The account of an import knows parameters by their names. What a model saves beside these, such as a buffer, would
    be memory that nobody filled.

    Args:
        state_dict: What is about to be saved, with a section for each chunk of the model.

    Raises:
        ValueError: A tensor is no parameter that the account has a source of, nor made of the checkpoint's tensors.
    """
    account = proof.account_of_import()
    if account is None:
        return
    names = {task.param_name for task in account.tasks}
    weights = (task.param_weight for task in account.tasks)
    filled = {each.untyped_storage().data_ptr() for each in weights if each is not None and not each.is_meta}
    for section, entries in state_dict.items():
        if not section.startswith("model") or not isinstance(entries, dict):
            continue
        absent = [name.split(".") for name in names - entries.keys()]
        for name, entry in entries.items():
            data = getattr(entry, "data", entry)
            if not isinstance(data, torch.Tensor) or isinstance(data, PiecewiseTensor):
                continue
            # Modules make these (`get_extra_state`).
            if "._extra_state" in name or CONSTRUCTED.search(name):
                continue
            # `with_transformer_engine_keys` stores some a second time, as "name@key".
            own = name.partition("@")[0]
            if own in names or data.untyped_storage().data_ptr() in filled:
                continue
            if not any(_differ_in_one_part(own.split("."), each) for each in absent):
                raise ValueError(
                    f"{account.name} has no source for {name!r}, which the Megatron model saves beside its "
                    "parameters: its bridge doesn't know this variant"
                )


def _differ_in_one_part(first: list[str], second: list[str]) -> bool:
    """Tell a parameter by another name: Gemma 4 saves `self_attention` as `self_attention_sliding` or `_global`."""
    return len(first) == len(second) and sum(one != other for one, other in zip(first, second, strict=True)) == 1
