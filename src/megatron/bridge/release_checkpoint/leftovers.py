# SPDX-License-Identifier: Apache-2.0
"""Staging folders of others: those of running processes, those that killed ones left, and what people have made.

Only what a killed process left is removed. The file in a staging folder, and the lock on this file, tell it.
"""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron.bridge.release_checkpoint.files import HOST, OWNER, remove_staging
from megatron.bridge.release_checkpoint.layout import INCOMPLETE, as_path


logger = logging.getLogger(__name__)

RUNNING, LEFT, UNKNOWN = "running", "left", "unknown"
_NAME = re.compile(rf".+{re.escape(INCOMPLETE)}\.([A-Za-z0-9._]+)-([0-9]+)-[0-9a-f]{{8}}", re.DOTALL)


def staging_folders(target: Path) -> Iterator[Path]:
    """Return what lies beside a folder under a name that stands for its successor, whoever made it."""
    prefix = f"{target.name}{INCOMPLETE}."
    with suppress(FileNotFoundError):
        yield from sorted(each for each in target.parent.iterdir() if f"{each.name}.".startswith(prefix))


def state_of(folder: Path) -> str:
    """Return whether a process writes to a staging folder, a killed one left it, or neither is known."""
    named, text = _NAME.fullmatch(folder.name), b""
    if not named or folder.is_symlink() or not folder.is_dir():
        return UNKNOWN
    try:
        with open(os.open(folder / OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            text = file.read(1000)
            # Shared, so that those who look don't take each other for the owner.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except OSError as error:
        # On a file system without locks, the owner may be alive.
        return RUNNING if error.errno == errno.EWOULDBLOCK else UNKNOWN
    # Another host may have mounted this file system without sharing its locks.
    if named[1] != HOST:
        return UNKNOWN
    if text:
        return LEFT if text.startswith(os.fsencode(f"{folder.name} ")) else UNKNOWN
    # Its owner was killed before it wrote anything, or is about to write.
    has_nothing = {each.name for each in folder.iterdir()} <= {OWNER}
    return LEFT if has_nothing and not Path("/proc", named[2]).exists() else UNKNOWN


def refuse_second(folder: Path, target: Path) -> None:
    """Let the first of several processes go on that write the same at once.

    Args:
        folder: The staging folder of this process.
        target: The folder whose successor it holds.

    Raises:
        FileExistsError: Another process was first.
    """
    for other in staging_folders(target):
        if state_of(other) == RUNNING and _since(other) < _since(folder):
            busy = f"another process is writing to {target}, in {other.name}"
            raise FileExistsError(f"{busy}: wait for it, or pass a different path")


def clear(payload: str | os.PathLike) -> None:
    """Make room for what this process writes: remove what killed ones left, and name what isn't known to be theirs.

    Args:
        payload: The payload of its staging folder. Nothing is done in an object store, which has no such folders.

    Raises:
        FileExistsError: Another process was first.
    """
    path = as_path(payload)
    if not isinstance(path, Path):
        return
    target = path.parent.with_name(path.name)
    refuse_second(path.parent, target)
    for other in staging_folders(target):
        state = state_of(other)
        if state == LEFT:
            with suppress(OSError):
                remove_staging(other, target)
        elif state == UNKNOWN:
            logger.warning("%s stays, because it may be somebody else's: remove it if nobody needs it", other)


def _since(folder: Path) -> tuple[float, str]:
    """Return what orders processes. As long as its file is empty, nobody waits for one."""
    with suppress(FileNotFoundError):
        if (found := (folder / OWNER).stat()).st_size:
            return found.st_mtime_ns, folder.name
    return float("inf"), folder.name
