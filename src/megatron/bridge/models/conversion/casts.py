# SPDX-License-Identifier: Apache-2.0
"""Casts of an import: those that nobody asked for are told, those that overflow are errors."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron.bridge.models.conversion.accounting import Account
from megatron.bridge.models.conversion.hf_checkpoint import is_finite
from megatron.bridge.models.conversion.hf_files import read_file, some
from megatron.bridge.models.conversion.quantized import FLOAT8, is_scale
from megatron.bridge.release_checkpoint import proof


logger = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20
_NUMBER = re.compile(r"\.\d+(?=\.)")


def warn_of_casts(account: Account | None) -> None:
    """Warn of casts to the dtype of the model, by kinds of tensors. A dtype that was asked for needs no warning.

    Args:
        account: The account of an import.
    """
    if account is None or getattr(account.hf_pretrained, "torch_dtype", None) is not None:
        return
    kinds: dict[tuple[torch.dtype, torch.dtype], set[str]] = defaultdict(set)
    for _, dtype, names in _casts(account):
        for name in names:
            kinds[account.stored[name].dtype, dtype].add(_NUMBER.sub(".*", name))
    for (stored, wanted), kind in sorted(kinds.items(), key=str):
        proof.warn(logger, f"cast from {stored} to {wanted}, the dtype of the Megatron model: {some(kind)}")


def check_overflow(account: Account | None) -> None:
    """Check that no cast made infinity of a finite value.

    Args:
        account: The account of an import whose weights are in the model.

    Raises:
        ValueError: One did.
    """
    if account is None:
        return
    for weight, dtype, names in _casts(account):
        wider = [name for name in names if _largest(account.stored[name].dtype) > torch.finfo(dtype).max]
        if wider and not is_finite(weight.to(dtype)):
            for name in wider:
                check_cast(name, account.values(name), dtype)


def check_pieces(key: str, tensor: Any) -> None:
    """Check the casts of a tensor that is written in blocks. Called when its values are not finite.

    Args:
        key: Its name in the Megatron checkpoint, for values that are not read from a file as they are.
        tensor: The tensor, which is made of pieces of files (streaming/tensor.py).

    Raises:
        ValueError: A cast made infinity of a finite value.
    """
    for piece in tensor.pieces:
        if piece.casts:
            name = getattr(piece.source, "name", key)
            if path := getattr(piece.source, "path", None):
                at = piece.source.offset + piece.start * piece.source.dtype.itemsize
                name = next((name for name, each in read_file(path).items() if each.start <= at < each.stop), key)
            for block in replace(piece, casts=()).blocks(_BLOCK_BYTES):
                check_cast(name, block, tensor.dtype)


def check_cast(name: str, source: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that a tensor can be cast.

    Args:
        name: Its name in the checkpoint.
        source: Its values, or some of them.
        dtype: The dtype of the model.

    Raises:
        ValueError: A finite value is too large for the dtype.
    """
    limit = torch.finfo(dtype).max
    if not is_finite(source) or not source.numel():
        return
    largest = max(abs(extreme.item()) for extreme in torch.aminmax(source))
    if not torch.tensor(largest, dtype=source.dtype).to(dtype).isfinite():
        raise ValueError(
            f"{name} holds {largest:g} as {source.dtype}, {dtype} goes up to {limit:g}: choose a dtype that can hold "
            f"it, such as torch_dtype={source.dtype} (--dtype {str(source.dtype).removeprefix('torch.')})"
        )


def _casts(account: Account) -> Iterator[tuple[torch.Tensor, torch.dtype, list[str]]]:
    """Yield the parameters of this rank that are cast, to which dtype, and of which tensors."""
    for task in account.tasks:
        names = account.reads(task)
        # They are read times their scales, which are no weights.
        names = [name for name in names if account.stored[name].dtype in FLOAT8 and not is_scale(name)] or names
        if task.param_weight is None or not all(account.stored[name].dtype.is_floating_point for name in names):
            continue
        # Norms are cast to the dtype of the model after they are loaded.
        dtype, module = task.param_weight.dtype, task.megatron_module
        if module is not None and isinstance(task.param_weight, torch.nn.Parameter) and not _is_kept(task):
            dtype = getattr(module.config, "params_dtype", dtype)
        if cast := [name for name in names if account.stored[name].dtype != dtype]:
            yield task.param_weight, dtype, cast


def _is_kept(task: Any) -> bool:
    """Return whether nothing casts a parameter: it has no module, or this one keeps it in float32."""
    kept = getattr(task.megatron_module, "_keep_in_float32_parameter_names", ())
    return task.megatron_module is None or task.global_param_name.rpartition(".")[2] in kept


def _largest(dtype: torch.dtype) -> float:
    """Return the largest value that a stored tensor of this dtype can have. That of FP8 has a scale of float32."""
    return torch.finfo(torch.float32 if dtype in FLOAT8 else dtype).max
