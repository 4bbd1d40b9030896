# SPDX-License-Identifier: Apache-2.0
"""What `torch.save` wrote, read without torch: plain values, and where the values of each tensor lie in the file.

A rank's file of Megatron-LM's format before distributed checkpoints has args, weights and optimizer in one pickle. Its
tensors are read as bytes of the file, so that neither their number nor their size costs memory.
"""

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from megatron.bridge.release_checkpoint import pickles
from megatron.bridge.release_checkpoint.metadata import COMMON_CLASSES, StoredTensor
from megatron.bridge.release_checkpoint.pickles import Inert, UnreadablePickle


_MAX_PICKLE = 256 << 20
# What PyTorch up to 1.5 writes first, and what its successors write without their zip format.
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class StateDict(pickles.OrderedDict):
    """Stands for the `OrderedDict` of a module's state dict, of whose attribute `_metadata` nothing is kept."""

    __slots__ = ()

    def __new__(cls) -> Any:
        """Return a dict that is still empty."""
        return _Dict()


class _Dict(dict):
    def __setstate__(self, state: Any) -> None:
        pass


_CLASSES: pickles.Classes = {**COMMON_CLASSES, ("collections", "OrderedDict"): StateDict}


class Stored(NamedTuple):
    """A tensor in a file, contiguous and little-endian.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        file: The file.
        offset: The position of its first element, in bytes.
        transposed: The file has the transposed tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * _item_size(self.dtype)


class SavedFile:
    """A file of `torch.save`.

    Attributes:
        path: The file.
        state: What was saved, with instances of other classes as `Inert` and tensors as `StoredTensor`.
    """

    def __init__(self, path: Path) -> None:
        """Read everything but the values of tensors.

        Raises:
            RefusedPickle: The file names a class that Megatron-LM doesn't save.
            UnreadablePickle: It is not what `torch.save` writes, or is cut off.
            OSError: It can't be read.
        """
        self.path = path
        self._size = path.stat().st_size
        with path.open("rb") as file:
            is_old = file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP
        self._places: dict[str, int] = {}
        try:
            self.state = self._read_old() if is_old else self._read_zip()
        except (UnreadablePickle, OSError):
            raise
        except Exception as error:
            # What zipfile and pickletools raise depends on what is wrong.
            raise UnreadablePickle(path, f"the file is not what torch.save writes ({error})") from None

    def tensor(self, value: Any) -> Stored | None:
        """Return where a tensor lies, or None if the value is no tensor.

        Raises:
            UnreadablePickle: The tensor is not contiguous, or not in the file.
        """
        if isinstance(value, Inert) and value.name == "torch._utils._rebuild_parameter":
            value = value.args[0]
        if not isinstance(value, StoredTensor):
            return None
        try:
            (_, _, key, *_), start, _, strides, *_ = value.args
            size, expected = _item_size(value.dtype), 1
            for length, stride in zip(reversed(value.shape), reversed(strides), strict=True):
                if length > 1 and stride != expected:
                    raise ValueError("a tensor is not contiguous")
                expected *= length
            offset = self._places[key] + start * size
            if start < 0 or offset + expected * size > self._size:
                raise ValueError("the file is cut off")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UnreadablePickle(self.path, f"a tensor can't be found ({error})") from None
        return Stored(value.shape, value.dtype, self.path, offset)

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries:
                raise ValueError("it holds no data.pkl")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise ValueError("it is compressed")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("its values are big-endian")
            if entries["data.pkl"].file_size > _MAX_PICKLE:
                raise ValueError(f"its pickle has more than {_MAX_PICKLE} bytes")
            state = pickles.load(archive.read(entries["data.pkl"]), self.path, _CLASSES)
            for name, entry in entries.items():
                if name.startswith("data/"):
                    # Only the entry itself says how much padding is in front of its data.
                    file.seek(entry.header_offset)
                    *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
                    self._places[name.removeprefix("data/")] = start
        return state

    def _read_old(self) -> Any:
        """Read four pickles (magic number, version, system, state), the names of the storages, and their lengths."""
        with self.path.open("rb") as file:
            *_, state, names = (self._next_pickle(file) for _ in range(5))
            widths = _storage_widths(state)
            for name in names:
                (count,) = struct.unpack("<q", file.read(8))
                self._places[name] = file.tell()
                # Nothing that is looked for lies behind a storage that no tensor has.
                file.seek(count * widths.get(name, 0), os.SEEK_CUR)
        return state

    def _next_pickle(self, file: io.BufferedReader) -> Any:
        start = file.tell()
        if not any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(file)):
            raise ValueError("a pickle has no end")
        end = file.tell()
        if end - start > _MAX_PICKLE:
            raise ValueError(f"its pickle has more than {_MAX_PICKLE} bytes")
        file.seek(start)
        return pickles.load(file.read(end - start), self.path, _CLASSES)


def _item_size(dtype: str) -> int:
    """Return the bytes of an element."""
    return 1 if dtype == "bool" else int(re.findall(r"\d+", dtype)[0]) // 8


def _storage_widths(state: Any) -> dict[str, int]:
    """Return the bytes of an element of each storage of a state, by the storage's name."""
    widths, seen, left = {}, set(), [state]
    while left:
        value = left.pop()
        if isinstance(value, StoredTensor):
            (_, _, name, *_), *_ = value.args
            widths[name] = _item_size(value.dtype)
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Inert):
                left += [value.args, value.state]
            elif isinstance(value, (dict, list, tuple)):
                left += value.values() if isinstance(value, dict) else value
    return widths
