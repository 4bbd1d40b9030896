# SPDX-License-Identifier: Apache-2.0
"""Reads weights in files of `torch.save`, as models had them before safetensors. No code of theirs is run."""

import functools
import logging
import os
import re
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron.bridge.models.conversion.safetensors_header import DTYPES, StoredTensor, in_one_line, is_file


logger = logging.getLogger(__name__)

SUFFIX = ".bin"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# How PyTorch says what it refuses.
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_lock = threading.Lock()


def read_torch_file(path: str | os.PathLike) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file by name, without reading their values.

    Args:
        path: The file.

    Returns:
        The tensors. The range of one is -1 to -1 if its values don't lie one after the other: `load` has them.

    Raises:
        ValueError: `path` is not a file, the file is truncated or damaged, names what could run code, or holds
            anything but tensors.
    """
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"{path} is not a file, expected weights: download the checkpoint again")
    return _read(path, _content(path))


def load(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, mapped into memory; of a file from before PyTorch's zip format, in memory."""
    with _lock:
        return _load(path, _content(path))


def _content(path: Path) -> tuple[int, ...]:
    """Return what tells a file from another one that is at the same path later."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=2048)
def _read(path: Path, content: tuple[int, ...]) -> Mapping[str, StoredTensor]:
    found = _torch_load(path, map_location="meta")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{path} holds a {type(found).__name__}, expected tensors by name: get the model's own weights"
        )
    return MappingProxyType({name: _stored(path, name, tensor) for name, tensor in found.items()})


# Threads that convert neighbouring layers read neighbouring files.
@functools.lru_cache(maxsize=4)
def _load(path: Path, content: tuple[int, ...]) -> dict[str, torch.Tensor]:
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        size = f"{path.stat().st_size / 1e6:,.0f} MB of memory"
        logger.warning("%s is from before PyTorch's zip format: it is read whole, which takes %s", path, size)
    found = _torch_load(path, map_location="cpu", mmap=is_zip)
    return {name: tensor.detach().resolve_neg() for name, tensor in found.items()}


def _torch_load(path: Path, **options: Any) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _check_zip(path)
        return torch.load(path, weights_only=True, **options)
    except Exception as error:  # what it raises depends on what is wrong
        if found := _GLOBAL.search(str(error)):
            raise ValueError(
                f"{path} names {found[1]}, which weights don't need and which could run code: get the model as "
                "safetensors"
            ) from None
        what = "it is not what torch.save writes" if "Weights only" in str(error) else in_one_line(error)
        raise ValueError(f"{path} is truncated or damaged ({what}): download it again") from None


def _check_zip(path: Path) -> None:
    """Refuse what `torch.save` doesn't write on this machine: the bytes of the file are taken for the values."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != sys.byteorder.encode():
                raise ValueError(f"its bytes are not in {sys.byteorder}-endian order")


def _stored(path: Path, name: object, tensor: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise ValueError(
            f"{path} holds {name!r}, a {type(tensor).__name__}, expected tensors by name: get the model's own weights"
        )
    shape, dtype = tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype))
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or not tensor.is_contiguous() or tensor.is_neg():
        return StoredTensor(dtype, shape, -1, -1)
    start = offset + tensor.storage_offset() * tensor.itemsize
    return StoredTensor(dtype, shape, start, start + tensor.nbytes)
