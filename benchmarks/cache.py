# SPDX-License-Identifier: Apache-2.0
"""Takes files out of the page cache, without being root."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path


_PROBES = 64


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache, so that the next reader gets them from the disk."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached(folder: Path) -> float:
    """Return the part of a folder's bytes, from 0 to 1, that lies in the page cache, from some pages of each file."""
    total = found = 0.0
    for path in _files(folder):
        if probes := list(_probe(path)):
            size = path.stat().st_size
            total += size
            found += size * sum(probes) / len(probes)
    return found / total if total else 0.0


def _probe(path: Path) -> Iterator[bool]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        # Each page once: a probe brings in the page that it misses.
        for page in dict.fromkeys(size * at // _PROBES // mmap.PAGESIZE for at in range(_PROBES if size else 0)):
            # Random access, or a probe would have the kernel read on behind it.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            try:
                os.preadv(descriptor, [bytearray(1)], page * mmap.PAGESIZE, os.RWF_NOWAIT)
            except BlockingIOError:
                yield False
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return  # a file system that can't tell
            else:
                yield True
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
