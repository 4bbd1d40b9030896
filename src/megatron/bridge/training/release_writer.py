# SPDX-License-Identifier: Apache-2.0
"""Writes a release checkpoint: the payload is staged beside the old one, and then published or discarded.

A crash leaves the old checkpoint, or none, but never a tracker that names something unreadable. This relies on two
things: within a file system, a folder is renamed and a file is replaced in one step.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.release_checkpoint.files import Staging, sync, write_new
from megatron.bridge.release_checkpoint.layout import (
    BRIDGE_TRACKER,
    INCOMPLETE,
    RELEASE,
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
    if isinstance(path, Path):
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file, expected a directory: pass a different path")
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


def on_rank_0(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on rank 0; return its result or raise its error on every rank. Collective."""
    result = error = None
    if get_rank_safe() == 0:
        try:
            result = function(*arguments)
        except Exception as caught:
            error = caught
    if torch.distributed.is_initialized():
        # An error of another package may not survive pickling.
        is_builtin = error is None or type(error).__module__ == "builtins"
        sent = [result, error if is_builtin else RuntimeError(f"rank 0: {type(error).__name__}: {error}")]
        torch.distributed.broadcast_object_list(sent, src=0)
        result, error = sent[0], error or sent[1]
    if error is not None:
        raise error
    return result


class ReleaseWriter:
    """A context manager that writes a release checkpoint: :meth:`stage` it, fill :attr:`payload`, :meth:`publish` it.

    Until :meth:`publish`, the tracker and the checkpoint that it names stay unchanged. Without it, nothing is left.

    Args:
        root: Checkpoint root.
        deferred: Whether :meth:`publish` is called after the block, by the finalization of an asynchronous save.

    Attributes:
        payload: The folder to write the payload into, the same on every rank. Set by :meth:`stage`.
    """

    def __init__(self, root: str | os.PathLike, deferred: bool = False):
        self.root = as_path(root)
        self.payload = ""
        self._deferred = deferred
        self._staging: Staging | None = None

    def __enter__(self) -> "ReleaseWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None or not self._deferred:
            self.discard()

    def stage(self) -> str:
        """Open an empty folder for the payload, and return it. Collective."""
        # Both readers cache by path, and the path is about to hold another model. On every rank, because a rank that
        # answers from its cache would miss the broadcast of the others.
        read_run_config.cache_clear()
        read_train_state.cache_clear()
        self.payload = on_rank_0(self._stage)
        return self.payload

    def run(self, step: Callable[..., None], *arguments: Any) -> None:
        """Call a function on rank 0 once every rank has written, and discard the payload if it fails. Collective."""
        try:
            on_rank_0(step, *arguments)
        except BaseException:
            self.discard()
            raise

    def publish(self, before_tracker: Callable[[Path], Callable[[], None] | None] = lambda root: None) -> None:
        """Move the payload into place, then write the tracker. Collective.

        If the file system can swap two folders in one step, the tracker names a whole release at every moment.
        Otherwise there is no tracker for the moment between two renames.

        Args:
            before_tracker: Called on rank 0 with the root, when the payload has its name. May return what undoes it.
        """
        self.run(self._publish, before_tracker)

    def discard(self) -> None:
        """Remove what this process has staged. Does nothing after publication, and on ranks other than 0."""
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.close()

    def _stage(self) -> str:
        check_release_target(self.root)
        self._staging = Staging(self.root / RELEASE)
        self._staging.open()
        return str(self._staging.payload)

    def _publish(self, before_tracker: Callable[[Path], Callable[[], None] | None]) -> None:
        staging, tracker, undo = self._staging, self.root / TRACKER, None
        assert staging is not None, "stage() comes before publish()"
        for path in (*staging.payload.rglob("*"), staging.payload):
            sync(path)
        # Before anything changes, because the disk may be full.
        new_tracker = staging.folder / TRACKER
        write_new(new_tracker, RELEASE.encode())
        # A training takes no lock, and may have saved meanwhile.
        check_release_target(self.root)
        is_tracked = read_tracker(self.root) == (0, True)
        staging.put(before=tracker.unlink if is_tracked else lambda: None)
        try:
            undo = before_tracker(self.root)
            check_release_target(self.root)
        except BaseException:
            staging.take_back()
            if undo is not None:
                undo()
            if is_tracked and not tracker.exists():
                new_tracker.replace(tracker)
            raise
        # Bridge's own tracker would point its readers at an iteration of an earlier import.
        (self.root / BRIDGE_TRACKER).unlink(missing_ok=True)
        new_tracker.replace(tracker)
        # A killed repair leaves it. A link isn't from one.
        partial = self.root / f"{TRACKER}{INCOMPLETE}"
        if partial.is_file() and not partial.is_symlink():
            partial.unlink()
        sync(self.root)
        try:
            self.discard()
        except OSError as error:
            # The new checkpoint is whole. Some network file systems keep the folder of an open file.
            logger.warning("%s could not be removed, the next import tries again: %s", staging.folder, error)
