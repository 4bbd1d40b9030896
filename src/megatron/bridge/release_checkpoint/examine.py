# SPDX-License-Identifier: Apache-2.0
"""What lies at a path: a checkpoint root with its tracker and payload folders, or something else."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron.bridge.release_checkpoint.layout import (
    COMMON_PT,
    INCOMPLETE,
    ITERATION,
    ITERATION_0,
    RELEASE,
    REPLACED,
    TRACKER,
    TRIAL,
    is_link_to_release,
    is_payload,
)
from megatron.bridge.release_checkpoint.leftovers import LEFT, RUNNING, staging_folders, state_of
from megatron.bridge.release_checkpoint.payload import Payload, examine_payload


@dataclass
class Checkpoint:
    """What lies at a path.

    Attributes:
        root: The checkpoint root, which `--load` takes.
        kind: "root", "payload" (the path is a payload folder, `root` is above it), "empty", "missing" or "file".
        tracker: Text of the tracker, None if there is none.
        folders: Names of the payload folders of the root. A link `iter_0000000` is none.
        link: Where `iter_0000000` leads if it is a symbolic link, None if it isn't.
        leftovers: Names of what a killed import or repair left in the root.
        busy: Whether an import or a repair of this root is running.
        payload: What Megatron-LM would load. If the tracker names nothing that exists, what a repair would use.
        named: The folder that the tracker names, whether it exists or not. None if the tracker makes no sense.
    """

    root: Path
    kind: str
    tracker: str | None = None
    folders: list[str] = field(default_factory=list)
    link: str | None = None
    leftovers: list[str] = field(default_factory=list)
    busy: bool = False
    payload: Payload | None = None
    named: str | None = None

    @property
    def iteration(self) -> int:
        """The highest iteration of tracker, folders and payload. Above 0 it is a training."""
        names = [*self.folders, *([self.named] if self.named else [])]
        numbers = [int(name[5:]) for name in names if name.startswith("iter_")]
        return max([*numbers, self.payload.iteration if self.payload else 0], default=0)

    @property
    def misled(self) -> str | None:
        """Where `iter_0000000` leads if it is a link to anything but the release beside it, otherwise None."""
        return self.link if self.link != RELEASE else None

    @property
    def layout(self) -> str | None:
        """The layout by tracker and folder: "release", "iter" (Bridge's iteration 0), "training", or None."""
        if self.payload is None:
            return None
        if self.iteration > 0 or self.payload.has_optimizer:
            return "training"
        found = self.payload.path.name
        return {RELEASE: "release", ITERATION_0: "iter"}.get(found) if found == self.named else None


def examine(path: Path) -> Checkpoint:
    """Look at a checkpoint root or a payload folder.

    Args:
        path: Any path, whether it exists or not.

    Raises:
        OSError: It can't be read.
    """
    if not path.exists():
        return Checkpoint(path, "missing")
    if not path.is_dir():
        return Checkpoint(path, "file")
    if is_payload(path) or (path / COMMON_PT).is_file():
        chosen = path.absolute()
        if chosen.name == ITERATION_0 and is_link_to_release(chosen):
            chosen = chosen.with_name(RELEASE)
        return _examine_root(chosen.parent, chosen)
    return _examine_root(path)


def _link(path: Path) -> str | None:
    """Return where a symbolic link leads, None where there is none."""
    return os.readlink(path) if path.is_symlink() else None


def _examine_root(root: Path, chosen: Path | None = None) -> Checkpoint:
    found = Checkpoint(root, "payload" if chosen else "root")
    found.link = _link(root / ITERATION_0)
    # A link is no second payload, and what it leads to outside of the root does not belong to this checkpoint.
    linked = {ITERATION_0} if found.link is not None else set()
    names = sorted(entry.name for entry in os.scandir(root) if entry.name not in linked)
    found.folders = [name for name in names if (root / name).is_dir() and (name == RELEASE or _is_iteration(name))]
    states = {folder.name: state_of(folder) for folder in staging_folders(root / RELEASE)}
    found.busy = RUNNING in states.values()
    found.leftovers = [name for name in names if states.get(name) == LEFT or _is_left(root, name)]
    if (root / TRACKER).is_file():
        with (root / TRACKER).open("rb") as file:
            found.tracker = file.read(80).decode("utf-8", "replace").strip()
        if found.tracker == RELEASE:
            found.named = RELEASE
        elif re.fullmatch(r"[0-9]{1,18}", found.tracker):
            found.named = ITERATION.format(int(found.tracker))
    # If iter_0000000 is a link, a tracker that says 0 leads to the release.
    candidates = [found.named, RELEASE, *reversed([name for name in found.folders if _is_iteration(name)])]
    there = [name for name in candidates if name in found.folders]
    there += [name for name in (f"{left}/{REPLACED}" for left in found.leftovers) if (root / name).is_dir()]
    there += [REPLACED] if REPLACED in found.leftovers else []
    if chosen or there:
        found.payload = examine_payload(chosen or root / there[0])
    elif found.tracker is None and not found.leftovers:
        found.kind = "empty"
    return found


def _is_left(root: Path, name: str) -> bool:
    """Return whether a killed import or repair left this, other than a staging folder."""
    if name == REPLACED:
        # Imports used it before staging folders had names of their own.
        return is_payload(root / name) and not (root / name).is_symlink()
    return name == TRACKER + INCOMPLETE or name == TRIAL and is_link_to_release(root / TRIAL)


def _is_iteration(name: str) -> bool:
    return re.fullmatch(r"iter_[0-9]{7,18}", name) is not None
