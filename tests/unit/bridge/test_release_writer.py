# SPDX-License-Identifier: Apache-2.0
"""Staging, publication and discard of a release checkpoint, on folders that hold no weights."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron.bridge.release_checkpoint.layout import TRACKER
from megatron.bridge.training.release_writer import ReleaseWriter


RELEASE_ONLY = {"release", "release/metadata.json", TRACKER}


def write_release(root, text, **hooks):
    with ReleaseWriter(root) as writer:
        Path(writer.stage(), "metadata.json").write_text(text)
        writer.publish(**hooks)


def entries(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def test_a_release_is_the_payload_and_a_tracker(tmp_path):
    root = tmp_path / "new" / "out"
    write_release(root, "payload")
    assert entries(root) == RELEASE_ONLY
    assert (root / TRACKER).read_text() == "release"


def test_nothing_changes_before_publication(tmp_path):
    write_release(tmp_path, "old")
    with ReleaseWriter(tmp_path) as writer:
        payload = Path(writer.stage())
        (payload / "metadata.json").write_text("new")
        assert payload.parent.parent == tmp_path
        assert (tmp_path / "release/metadata.json").read_text() == "old"
        assert (tmp_path / TRACKER).read_text() == "release"
    assert entries(tmp_path) == RELEASE_ONLY and (tmp_path / "release/metadata.json").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), CheckpointException("", {})])
def test_a_block_that_raises_leaves_nothing(tmp_path, error):
    root = tmp_path / "deeply" / "nested" / "out"
    with pytest.raises((KeyboardInterrupt, OSError, CheckpointException)), ReleaseWriter(root) as writer:
        Path(writer.stage(), "metadata.json").write_text("half")
        raise error
    assert entries(tmp_path) == set()
