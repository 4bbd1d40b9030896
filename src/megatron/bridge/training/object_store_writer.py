# SPDX-License-Identifier: Apache-2.0
"""Writes a release checkpoint to an object store, over MultiStorageClient.

Object stores can't rename folders, and a copy would move the weights twice. The payload is written in place, and only
the order protects it: the tracker of an old release is removed first, the new one is written last.
"""

import os
from collections.abc import Callable
from pathlib import Path

from megatron.bridge.release_checkpoint.layout import BRIDGE_TRACKER, RELEASE, TRACKER, as_path, read_tracker
from megatron.bridge.training.release_writer import ReleaseWriter, check_release_target


class ObjectStoreWriter(ReleaseWriter):
    """A :class:`ReleaseWriter` for a MultiStorageClient URL."""

    def discard(self) -> None:
        """Do nothing: without a tracker, the next writer clears what is there."""

    def _stage(self) -> str:
        check_release_target(self.root)
        if read_tracker(self.root) == (0, True):
            (self.root / TRACKER).unlink()
        payload = self.root / RELEASE
        if payload.is_dir():
            for leftover in payload.rglob("*"):
                if leftover.is_file():
                    leftover.unlink()
        return str(payload)

    def _publish(self, before_tracker: Callable[[Path], Callable[[], None] | None]) -> None:
        # A training may have saved meanwhile.
        check_release_target(self.root)
        (self.root / BRIDGE_TRACKER).unlink(missing_ok=True)
        (self.root / TRACKER).write_text(RELEASE)


def release_writer(root: str | os.PathLike, deferred: bool = False) -> ReleaseWriter:
    """Return the writer for a checkpoint root, a local path or a MultiStorageClient URL."""
    return (ReleaseWriter if isinstance(as_path(root), Path) else ObjectStoreWriter)(root, deferred)
