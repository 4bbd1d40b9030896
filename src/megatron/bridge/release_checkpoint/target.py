# SPDX-License-Identifier: Apache-2.0
"""What a path must be before minutes are spent on writing to it."""

import errno
import os
import shutil
from pathlib import Path


def existing_parent(path: Path) -> Path:
    """Return a path, or the innermost folder above it that exists.

    Raises:
        OSError: It is a file, or no folder can be made in it.
    """
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file, expected a directory: pass a different path")
    return existing


def check_export_target(path: Path, overwrite: bool | None) -> None:
    """Refuse a path at which an export can't appear.

    Args:
        path: Where the export goes. A link is followed.
        overwrite: Whether it may replace an earlier export. None: it takes the place of the files that it writes.

    Raises:
        OSError: The path is refused.
    """
    target = path.resolve()
    parent = existing_parent(target)
    if parent == target:
        if target.is_mount() or target.samefile(Path.cwd()):
            what = "a mount point" if target.is_mount() else "the current folder"
            raise OSError(f"{path} is {what}, which an export can't replace: pass a folder in it, {path / 'hf'}")
        if overwrite is not None and any(target.iterdir()):
            if not overwrite:
                what = f"{path} exists, expected no such path, or an empty folder"
                raise FileExistsError(f"{what}: pass a different path, or --overwrite (overwrite=True)")
            if not (target / "config.json").is_file():
                what = f"{path} holds no config.json, so it is no Hugging Face model that an export could replace"
                raise FileExistsError(f"{what}: pass a different path")
        parent = target.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} is not writable: change its permissions or pass a different path")


def check_space(path: Path, needed: int) -> None:
    """Refuse a path on a file system with less than `needed` bytes left, if it says how much is left.

    Raises:
        OSError: The disk is too full.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed:
        has = f"{path} is on a disk with {free / 1e9:,.2f} GB left, expected at least {needed / 1e9:,.2f} GB"
        raise OSError(errno.ENOSPC, f"{has}: free space there, or pass a different path")
