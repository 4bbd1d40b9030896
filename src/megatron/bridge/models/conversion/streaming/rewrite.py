# SPDX-License-Identifier: Apache-2.0
"""Writes the weights of a Hugging Face model anew, block by block: in another dtype, or in files of another size."""

import json
import os
from pathlib import Path

import torch

from megatron.bridge.models.conversion.casts import check_pieces
from megatron.bridge.models.conversion.hf_files import INDEX
from megatron.bridge.models.conversion.safetensors_header import DTYPES, read_header
from megatron.bridge.models.conversion.streaming.safetensors_files import save_files, save_index, save_split
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.utils.common_utils import get_rank_safe


def rewrite(folder: str | os.PathLike, dtype: torch.dtype | None, max_shard_size: int | str | None) -> None:
    """Write the weights of an export anew. Collective.

    Args:
        folder: The export.
        dtype: The dtype of the floating-point tensors. None: as they are.
        max_shard_size: The size that files have at most, in bytes or as "5GB". None: as they are divided.

    Raises:
        ValueError: A value is too large for the dtype, or the weights are quantized.
    """
    if dtype is None and max_shard_size is None:
        return
    root = Path(folder)
    files = sorted(root.glob("*.safetensors"))
    stored = {name: (file, tensor) for file in files for name, tensor in read_header(file).items()}
    tensors = {}
    for name, (file, tensor) in stored.items():
        pieces = PiecewiseTensor.of(InFile(file, tensor.start, DTYPES[tensor.dtype]), tensor.shape)
        tensors[name] = _cast(name, pieces, dtype)
    new = root / "rewritten"
    new.mkdir(exist_ok=True)
    if max_shard_size is not None:
        save_split(tensors, new, max_shard_size)
    else:
        names = {name: file.name for name, (file, _) in stored.items()}
        save_files(tensors, names, new)
        if (root / INDEX).is_file():
            save_index({"total_size": sum(tensor.nbytes for tensor in tensors.values())}, names, new, indent=2)
    if get_rank_safe() != 0:
        return
    for file in (*files, root / INDEX):
        file.unlink(missing_ok=True)
    for file in new.iterdir():
        file.rename(root / file.name)
    new.rmdir()
    if dtype is not None:
        _tell(root / "config.json", str(dtype).removeprefix("torch."))


def _cast(name: str, tensor: PiecewiseTensor, dtype: torch.dtype | None) -> PiecewiseTensor:
    if dtype is None or not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    if tensor.dtype.itemsize == 1:
        raise ValueError(f"{name} is quantized ({tensor.dtype}), expected weights that can be cast: pass no dtype")
    cast = tensor.cast(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        check_pieces(name, cast)
    return cast


def _tell(path: Path, dtype: str) -> None:
    """Say in a config which dtype the weights have."""
    if not path.is_file():
        return
    config = json.loads(path.read_bytes())
    for key in ("torch_dtype", "dtype"):
        if key in config and config[key] != dtype:
            config[key] = dtype
            path.write_text(f"{json.dumps(config, indent=2, ensure_ascii=False)}\n", encoding="utf-8")
