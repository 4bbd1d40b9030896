# SPDX-License-Identifier: Apache-2.0
"""Drop files from the page cache, without root permissions."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path


_PROBES = 64


def drop(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that the next reader gets them from the disk."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # unwritten pages can't be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached(folder: Path) -> float:
    """Return the fraction of a folder's bytes in the page cache, estimated from some pages of each file."""
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
        # Probe each page only once, because a probe may load a missing page.
        for page in dict.fromkeys(size * at // _PROBES // mmap.PAGESIZE for at in range(_PROBES if size else 0)):
            # Random access keeps the kernel from reading ahead.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            try:
                os.preadv(descriptor, [bytearray(1)], page * mmap.PAGESIZE, os.RWF_NOWAIT)
            except BlockingIOError:
                yield False
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return  # the file system can't tell
            else:
                yield True
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
