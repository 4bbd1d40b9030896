# SPDX-License-Identifier: Apache-2.0
"""Writes a release checkpoint: the payload is staged beside the old one, and then published or discarded.

A crash leaves the old checkpoint, or none, but never a tracker that names something unreadable. This relies on two
things: within a file system, a folder is renamed and a file is replaced in one step.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.release_checkpoint.files import exchange, lock, remove, sync, write_new
from megatron.bridge.release_checkpoint.layout import (
    BRIDGE_TRACKER,
    INCOMPLETE,
    RELEASE,
    REPLACED,
    STAGING,
    TRACKER,
    as_path,
    read_tracker,
    saved_iterations,
)
from megatron.bridge.training.utils.checkpoint_utils import read_run_config, read_train_state
from megatron.bridge.utils.common_utils import get_rank_safe


logger = logging.getLogger(__name__)


def check_release_target(root: str | os.PathLike) -> None:
    """Refuse a root that can't be written to, or holds training iterations, which a release's tracker would hide.

    Raises:
        OSError: The root is refused.
        ValueError: The tracker holds neither an iteration nor ``release``.
    """
    path = as_path(root)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{root} is a file, expected a directory: pass a different path")
    if isinstance(path, Path):
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file, so {root} can't be made: pass a different path")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"{existing} is not writable: change its permissions or pass a different path")
    if not path.exists():
        return
    tracked = read_tracker(path)
    iteration = max([tracked[0] if tracked else 0, *saved_iterations(path)])
    if iteration > 0:
        raise FileExistsError(
            f"{root} holds training iteration {iteration}, and a release checkpoint would set its tracker back: "
            "pass a different path, or move the training checkpoints away"
        )


def on_rank_0(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function on rank 0 and raise its error on every rank, so that none waits for the others. Collective."""
    error = None
    if get_rank_safe() == 0:
        try:
            function(*arguments)
        except Exception as caught:
            error = caught
    if torch.distributed.is_initialized():
        # An error of another package may not survive pickling.
        is_builtin = error is None or type(error).__module__ == "builtins"
        errors = [error if is_builtin else RuntimeError(f"rank 0: {type(error).__name__}: {error}")]
        torch.distributed.broadcast_object_list(errors, src=0)
        error = error or errors[0]
    if error is not None:
        raise error


class ReleaseWriter:
    """A context manager that writes a release checkpoint: :meth:`stage` it, fill :attr:`payload`, :meth:`publish` it.

    Until :meth:`publish`, the tracker and the checkpoint that it names stay unchanged. A block that raises, or ends
    without publication, leaves nothing behind.

    Args:
        root: Checkpoint root.
        deferred: Whether :meth:`publish` is called after the block, by the finalization of an asynchronous save.

    Attributes:
        payload: The folder to write the payload into, the same on every rank.
    """

    def __init__(self, root: str | os.PathLike, deferred: bool = False):
        self.root = as_path(root)
        self.payload = str(self.root / STAGING)
        self._deferred = deferred
        self._is_staged = False
        # Descriptors. The locks tell a running import from what a crash left behind.
        self._locks: list[int] = []
        # Folders that this writer made, the root last.
        self._made: list[Path] = []

    def __enter__(self) -> "ReleaseWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None or not self._deferred:
            self.discard()

    def stage(self) -> str:
        """Open an empty folder for the payload, clear what an earlier crash left, and return it. Collective."""
        # Both readers cache by path, and the path is about to hold another model. On every rank, because a rank that
        # answers from its cache would miss the broadcast of the others.
        read_run_config.cache_clear()
        read_train_state.cache_clear()
        on_rank_0(self._stage)
        return self.payload

    def run(self, step: Callable[..., None], *arguments: Any) -> None:
        """Call a function on rank 0 once every rank has written, and discard the payload if it fails. Collective."""
        try:
            on_rank_0(step, *arguments)
        except BaseException:
            self.discard()
            raise

    def publish(self, before_tracker: Callable[[Path], None] = lambda root: None) -> None:
        """Move the payload into place, then write the tracker. Collective.

        If the file system can swap two folders in one step, the tracker names a whole release at every moment.
        Otherwise there is no tracker for the moment between two renames.

        Args:
            before_tracker: Called on rank 0 with the root, when the payload has its name.
        """
        self.run(self._publish, before_tracker)

    def discard(self) -> None:
        """Remove what this process has staged. Does nothing after publication, and on ranks other than 0."""
        if not self._is_staged:
            return
        try:
            # Under the lock, because another import could have taken over what is removed here.
            remove(self.root / STAGING)
            remove(self.root / (TRACKER + INCOMPLETE))
            for folder in reversed(self._made):
                with suppress(OSError):
                    folder.rmdir()
        finally:
            self._close()

    def _stage(self) -> None:
        check_release_target(self.root)
        staging = self.root / STAGING
        self._made = [path for path in reversed((self.root, *self.root.parents)) if not path.exists()]
        if staging.is_symlink() or staging.is_file():
            # What a link leads to is not this writer's to clear.
            staging.unlink()
        staging.mkdir(parents=True, exist_ok=True)
        self._lock(staging)
        self._is_staged = True
        for leftover in staging.iterdir():
            remove(leftover)
        if read_tracker(self.root) == (0, True) and (self.root / RELEASE).is_dir():
            # An import was killed after publication. Without its successor, the replaced payload would have to stay.
            remove(self.root / REPLACED)

    def _publish(self, before_tracker: Callable[[Path], None]) -> None:
        tracker, new_tracker = self.root / TRACKER, self.root / (TRACKER + INCOMPLETE)
        payload, staging, replaced = self.root / RELEASE, self.root / STAGING, self.root / REPLACED
        for path in (*staging.rglob("*"), staging):
            sync(path)
        # Before anything changes, because the disk may be full.
        write_new(new_tracker, RELEASE.encode())
        # Bridge's own tracker would point its readers at an iteration of an earlier import.
        (self.root / BRIDGE_TRACKER).unlink(missing_ok=True)
        if not self._swap(staging, payload):
            remove(replaced)
            if os.path.lexists(payload):
                if read_tracker(self.root) == (0, True):
                    tracker.unlink()
                payload.rename(replaced)
            staging.rename(payload)
        before_tracker(self.root)
        new_tracker.replace(tracker)
        sync(self.root)
        for old in (staging, replaced):
            try:
                remove(old)
            except OSError as error:
                # The new checkpoint is whole. Some network file systems keep the folder of an open file.
                logger.warning("%s could not be removed, the next import tries again: %s", old, error)
        self._close()

    def _swap(self, staging: Path, payload: Path) -> bool:
        if payload.is_symlink() or not payload.is_dir():
            return False
        # The old payload is about to stand where another import would take it for a leftover.
        with suppress(FileExistsError):
            self._lock(payload)
        return exchange(staging, payload)

    def _lock(self, folder: Path) -> None:
        try:
            self._locks.append(lock(folder))
        except BlockingIOError:
            busy = f"another process is writing a release checkpoint to {self.root}"
            raise FileExistsError(f"{busy}: wait for it, or pass a different path") from None

    def _close(self) -> None:
        self._is_staged = False
        while self._locks:
            os.close(self._locks.pop())
