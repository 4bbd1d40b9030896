# SPDX-License-Identifier: Apache-2.0
"""Changes to files and folders that survive a crash, and the lock of a folder that is being written."""

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path


# From Linux's fcntl.h and linux/fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of flock() on network file systems that have no locks.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def write_new(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk. What lies at the path is removed first, so that no link is followed."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything below it. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, by ``renameat2`` of Linux (ext4, XFS, Btrfs, tmpfs and others, but not NFS).

    Returns:
        False, with nothing changed, if the kernel or the file system can't.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return renameat2 is not None and renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def lock(folder: Path) -> int:
    """Lock a folder against other processes. This has no effect on file systems without locks.

    Returns:
        A descriptor. The lock is released when it is closed, or when the process ends.

    Raises:
        BlockingIOError: Another process has locked the folder, or has just moved or removed it.
    """
    gone = BlockingIOError(errno.EWOULDBLOCK, "it was moved or removed", str(folder))
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise gone from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have published or removed the folder between opening and locking.
        if not os.path.lexists(folder) or not os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            raise gone
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    return descriptor
