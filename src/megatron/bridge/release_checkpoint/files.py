# SPDX-License-Identifier: Apache-2.0
"""Changes to files and folders that survive a crash, and the folder in which the successor of another one grows."""

import ctypes
import fcntl
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.bridge.release_checkpoint.layout import INCOMPLETE


# In a staging folder, says whose it is.
OWNER = "OWNER"
HOST = re.sub("[^A-Za-z0-9.]", "_", platform.node())[:32] or "host"
# From Linux's fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


def remove_staging(folder: Path, target: Path) -> None:
    """Remove a staging folder, the file that says whose it is last. What its target was gets its name back."""
    replaced = folder / f"{target.name}.replaced"
    if os.path.lexists(replaced) and not os.path.lexists(target):
        replaced.rename(target)
    for path in folder.iterdir():
        if path.name != OWNER:
            remove(path)
    (folder / OWNER).unlink(missing_ok=True)
    folder.rmdir()


class Staging:
    """A staging folder of this process, locked while it lives.

    Args:
        target: The folder whose successor it holds. Its parent is made if it doesn't exist.

    Attributes:
        folder: The staging folder.
        payload: The folder in it that becomes the target.
    """

    def __init__(self, target: Path):
        self.target = target
        self.folder = target.with_name(f"{target.name}{INCOMPLETE}.{HOST}-{os.getpid()}-{secrets.token_hex(4)}")
        self.payload = self.folder / target.name
        self._replaced = self.folder / f"{target.name}.replaced"
        # Folders that it makes, the innermost first.
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self._lock: int | None = None

    def open(self) -> None:
        """Make the folder."""
        try:
            self.folder.mkdir(parents=True)
            self._lock = os.open(self.folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with suppress(OSError):  # not all file systems have locks
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, os.fsencode(f"{self.folder.name} becomes {self.target} of Megatron-Bridge.\n"))
            self.payload.mkdir()
        except BaseException:
            self.close()
            raise

    def put(self, before: Callable[[], None]) -> None:
        """Give the payload the target's name, after a call of `before` if the file system can't swap two folders."""
        if not self.target.is_symlink() and exchange(self.payload, self.target):
            return
        before()
        if os.path.lexists(self.target):
            self.target.rename(self._replaced)
        self.payload.rename(self.target)

    def take_back(self) -> None:
        """Undo :meth:`put`."""
        if not self.payload.exists() or not exchange(self.payload, self.target):
            self.target.rename(self.payload)
            with suppress(FileNotFoundError):
                self._replaced.rename(self.target)

    def close(self) -> None:
        """Remove the folder with all that is in it, and the empty folders above it that were made for it."""
        try:
            if self.folder.exists():
                remove_staging(self.folder, self.target)
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
