# SPDX-License-Identifier: Apache-2.0
"""Steps of a repair: each is one rename, one removal, or one replacement of a small file."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint.files import OWNER, remove, remove_staging, sync, write_new
from megatron.bridge.release_checkpoint.layout import INCOMPLETE


class Refused(ValueError):
    """A checkpoint that a repair must not touch."""


class NeedsModel(Refused):
    """A checkpoint that a repair can't complete without the Hugging Face model that it came from."""


@dataclass(frozen=True)
class Step:
    """One step of a repair: what it does, in words, and the function that does it."""

    what: str
    do: Callable[[], None]


def act(function: Callable, *arguments: Any) -> None:
    """Change something in the file system. Every change goes through here, so that tests can interrupt each one."""
    function(*arguments)


def replace(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and flush it to the disk before it takes the place of the old one."""
    partial = path.with_name(path.name + INCOMPLETE)
    try:
        act(write_new, partial, data)
        if path.exists():
            shutil.copymode(path, partial)
        act(partial.replace, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, and flush the folder above it."""
    act(source.rename, target)
    sync(target.parent)


def removal(path: Path, why: str, shown: str | None = None, of_staging: Path | None = None) -> Step:
    """Return a step that removes a file or a folder, which may be the staging folder of a target."""

    def do() -> None:
        if of_staging is not None and (path / OWNER).is_file():
            act(remove_staging, path, of_staging)
        else:
            act(remove, path)
        sync(path.parent)

    return Step(f"remove {shown or path.name} ({why})", do)


def removal_of_empty(folder: Path) -> Step:
    """Return a step that removes an empty folder."""
    return Step(f"remove {folder.name} (it is empty)", lambda: act(folder.rmdir))


def completion(target: Path, index: Path) -> Step:
    """Return a step that moves `.metadata` from a folder without other files, or copies it from another folder."""
    what = f"{index.parent.name}/.metadata to {target.parent.name}"
    if is_empty(index.parent, but=index):
        return Step(f"move {what}", lambda: rename(index, target))
    return Step(f"copy {what}", lambda: replace(target, index.read_bytes()))


def is_empty(folder: Path, but: Path | None = None) -> bool:
    """Return whether a folder has no files, or only the file `but`."""
    return folder.is_dir() and not folder.is_symlink() and all(path == but for path in folder.iterdir())


def free_name(root: Path, name: str) -> str:
    """Return a name that nothing in a folder has."""
    names = (name, *(f"{name}.{number}" for number in range(1, 1000)))
    return next(each for each in names if not os.path.lexists(root / each))
