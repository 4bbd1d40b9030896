# SPDX-License-Identifier: Apache-2.0
"""Which payload a checkpoint root stands for, on folders that hold no weights."""

import logging

import pytest
import torch

from megatron.bridge.release_checkpoint import layout
from megatron.bridge.release_checkpoint.layout import BRIDGE_TRACKER, ITERATION_0, TRACKER, resolve_checkpoint


def make_release(root):
    (root / "release").mkdir(parents=True)
    (root / "release/metadata.json").touch()
    (root / TRACKER).write_text("release")
    return root / "release"


def make_iteration(root, iteration):
    payload = root / f"iter_{iteration:07d}"
    payload.mkdir(parents=True)
    (payload / "metadata.json").write_text(f"iteration {iteration}")
    return payload


def test_the_tracker_decides(tmp_path):
    release, iteration = make_release(tmp_path), make_iteration(tmp_path, 9)
    assert resolve_checkpoint(tmp_path) == str(release)
    (tmp_path / TRACKER).write_text("9\n")
    assert resolve_checkpoint(tmp_path) == str(iteration)


def test_a_payload_folder_is_taken_as_it_is(tmp_path, caplog):
    for payload in (make_release(tmp_path), make_iteration(tmp_path, 9), make_iteration(tmp_path, 0)):
        assert resolve_checkpoint(payload) == str(payload)
    assert not caplog.records


def test_without_a_tracker_the_train_state_decides_then_the_highest_iteration_then_the_release(tmp_path):
    (tmp_path / "release").mkdir()
    assert resolve_checkpoint(tmp_path) == str(tmp_path / "release")
    make_iteration(tmp_path, 10)
    make_iteration(tmp_path, 9)
    assert resolve_checkpoint(tmp_path) == str(tmp_path / "iter_0000010")
    torch.save({"step": torch.tensor(9)}, tmp_path / BRIDGE_TRACKER)
    assert resolve_checkpoint(tmp_path) == str(tmp_path / "iter_0000009")


def test_a_folder_without_checkpoints_resolves_to_itself(tmp_path):
    assert resolve_checkpoint(tmp_path) == str(tmp_path)
    assert resolve_checkpoint(tmp_path / "missing") == str(tmp_path / "missing")


def test_a_tracker_that_names_a_missing_folder_is_an_error(tmp_path):
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(FileNotFoundError, match="names iter_0000012, which is not there"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tracker", "step", "trusted"), [("5", 5, True), (None, 5, True), ("8", 5, False), ("release", 5, False)]
)
def test_the_train_state_is_trusted_only_where_it_agrees_with_the_tracker(tmp_path, tracker, step, trusted):
    torch.save({"step": torch.tensor(step)}, tmp_path / BRIDGE_TRACKER)
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert layout.train_state_tracker(tmp_path) == (str(tmp_path / BRIDGE_TRACKER) if trusted else "")


def test_iteration_0_beside_a_release_is_the_release_and_said_once(tmp_path, caplog):
    release = make_release(tmp_path)
    missing = tmp_path / ITERATION_0
    for path in 2 * (missing, f"{missing}/"):
        assert resolve_checkpoint(path) == str(release)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{missing} is not there, taking the release checkpoint beside it: use {release}"]


def test_a_link_to_the_release_is_no_iteration(tmp_path):
    release = make_release(tmp_path)
    (tmp_path / TRACKER).unlink()
    (tmp_path / ITERATION_0).symlink_to("release")
    assert resolve_checkpoint(tmp_path) == str(release)
