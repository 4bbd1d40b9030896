# SPDX-License-Identifier: Apache-2.0
"""The file form of a tensor in a distributed checkpoint: what `torch.save` writes, around values that come later."""

import mmap
import os
import threading
import warnings
from dataclasses import dataclass

import torch


_CHANGED = (
    "torch.save has changed, it writes the values of a tensor in another way: import with streaming=False, or with "
    "the torch that this release of Megatron-Bridge names"
)
# The filters of warnings are the whole process's.
_filtering = threading.Lock()


@dataclass
class Archive:
    """A zip archive with a gap where the values belong. As a file, it takes what `torch.save` writes.

    Attributes:
        before: What precedes the values.
        gap: The size of the values, in bytes.
    """

    before: bytes = b""
    gap: int = 0
    _after: bytes = b""

    @classmethod
    def around(cls, tensor: torch.Tensor) -> "Archive":
        """Return the archive of a tensor of this shape and dtype, whose values are not read.

        Raises:
            OSError: `torch.save` does not leave the expected gap.
        """
        archive = cls()
        values = torch.empty(0, dtype=tensor.dtype)
        if tensor.nbytes:
            values.set_(_addresses(tensor.nbytes))
        with torch.serialization.skip_data():
            torch.save(values.view(tensor.shape), archive)
        if archive.gap != tensor.nbytes:
            raise OSError(_CHANGED)
        return archive

    def write(self, data: bytes) -> int:  # noqa: D102
        if self.gap:
            self._after += bytes(data)
        else:
            self.before += bytes(data)
        return len(data)

    def seek(self, offset: int, whence: int) -> int:  # noqa: D102
        if whence != os.SEEK_CUR or self.gap:
            raise OSError(_CHANGED)
        self.gap = offset
        return offset

    def flush(self) -> None:  # noqa: D102
        pass

    def after(self, checksum: int) -> bytes:
        """Return what follows the values, with their CRC-32, which `torch.save` could not know.

        It is in the data descriptor, which comes first, and in the entry of the central directory (APPNOTE.TXT 6.3.10,
        sections 4.3.9 and 4.3.12).

        Raises:
            OSError: One of them is not where it is expected.
        """
        if not self.gap:
            return self._after
        after = bytearray(self._after)
        # The name follows 46 bytes of its entry, and torch.save calls the archive "archive".
        entry = after.find(b"archive/data/0") - 46
        if after[:4] != b"PK\x07\x08" or entry < 0 or after[entry : entry + 4] != b"PK\x01\x02":
            raise OSError(_CHANGED)
        for at in (4, entry + 16):
            after[at : at + 4] = checksum.to_bytes(4, "little")
        return bytes(after)


def _addresses(size: int) -> torch.UntypedStorage:
    """Return a storage that takes addresses but no memory: the kernel does not count a read-only mapping."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    with _filtering, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
