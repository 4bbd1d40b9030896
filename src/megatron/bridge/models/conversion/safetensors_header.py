# SPDX-License-Identifier: Apache-2.0
"""Reads the header of a safetensors file: which tensors the file holds, and where."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open


# The format's names of dtypes. It has others, for packed and quantized values, that PyTorch has no dtype for.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of weights.

    Attributes:
        dtype: The format's name of its dtype, a key of `DTYPES` if PyTorch has that dtype.
        shape: Its shape.
        start: The position in the file of its first byte.
        stop: The position in the file after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


def read_header(path: str | os.PathLike) -> Mapping[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of the header, which is read once.

    The safetensors library checks the header: the file has the size that the header says, tensors neither overlap nor
    leave gaps, and each has the size of its shape and dtype. It does not say where a tensor is, hence the second look.

    Args:
        path: The file.

    Raises:
        ValueError: `path` is not a file, or the file is truncated or damaged.
    """
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"{path} is not a file, expected weights: download the checkpoint again")
    found = path.stat()
    return _read(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


# An import reads every header for its files, its tensors, their dtypes and their places.
@functools.lru_cache(maxsize=2048)
def _read(path: Path, content: tuple[int, ...]) -> Mapping[str, StoredTensor]:
    try:
        # NumPy's view maps the file read-only. PyTorch's would be copied on write, so the kernel refuses to map a file
        # that is larger than the memory.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({in_one_line(error)}): download it again") from None
    header.pop("__metadata__", None)
    return MappingProxyType({name: _stored(entry, 8 + length) for name, entry in header.items()})


def _stored(entry: dict, data: int) -> StoredTensor:
    start, stop = (data + offset for offset in entry["data_offsets"])
    return StoredTensor(entry["dtype"], tuple(entry["shape"]), start, stop)


def is_file(path: Path) -> bool:
    """Return whether there is a file at a path that somebody else has written down."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def in_one_line(error: BaseException) -> str:
    """Return what an error says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
