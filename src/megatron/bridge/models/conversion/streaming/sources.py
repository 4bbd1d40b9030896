# SPDX-License-Identifier: Apache-2.0
"""Where the values of a tensor come from: a range of a file, or memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


# Asked of the disk before it is needed: more than a virtual disk reads ahead on its own.
_READ_AHEAD_BYTES = 8 << 20


class Source(Protocol):
    """A sequence of elements that can be read any number of times, from any thread."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:
        """Yield the elements from `start` to `stop` in one-dimensional tensors of at most `length` elements.

        Each is valid until the next one.
        """


@dataclass(frozen=True)
class InFile:
    """Elements in a file.

    They are read into a buffer, not mapped: mapped pages would count as resident memory, and a file that is cut off
    while it is read would end the process by a signal.

    Attributes:
        path: The file.
        offset: The position of the first element, in bytes.
        dtype: The dtype of the elements.
    """

    path: Path
    offset: int
    dtype: torch.dtype

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:  # noqa: D102
        position, end = (self.offset + at * self.dtype.itemsize for at in (start, stop))
        buffer = torch.empty(min(length * self.dtype.itemsize, end - position), dtype=torch.uint8)
        expected = position
        with self.path.open("rb", buffering=0) as file:
            file.seek(position)
            while position < end:
                while expected < min(position + _READ_AHEAD_BYTES, end):
                    os.posix_fadvise(file.fileno(), expected, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                    expected += _READ_AHEAD_BYTES
                block = buffer[: end - position]
                memory = memoryview(block.numpy())
                while memory:
                    count = file.readinto(memory)
                    if not count:
                        raise ValueError(f"{self.path} ends before byte {end}: download it again")
                    memory = memory[count:]
                yield block.view(self.dtype)
                position += block.nbytes


@dataclass(frozen=True, eq=False)
class InMemory:
    """The elements of a one-dimensional tensor."""

    flat: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.flat.dtype

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:  # noqa: D102
        yield from self.flat[start:stop].split(length)
