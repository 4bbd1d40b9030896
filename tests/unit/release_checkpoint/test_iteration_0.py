# SPDX-License-Identifier: Apache-2.0
"""What callers find who name `iter_0000000`: a stand-in, a link, and that layout, in imports of a model."""

import os
from pathlib import Path

import pytest
from test_layout import make_release
from test_release_writer import entries
from tiny_models import PAYLOAD, names, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.layout import ITERATION_0, TRACKER, release_for, resolve_checkpoint
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.release_options import LAYOUT_VARIABLE


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(autouse=True)
def _no_layout(monkeypatch):
    monkeypatch.delenv(LAYOUT_VARIABLE, raising=False)


def test_a_training_that_is_to_start_there_starts_from_the_release(tmp_path):
    make_release(tmp_path)
    config = CheckpointConfig(pretrained_checkpoint=str(tmp_path / ITERATION_0), load=str(tmp_path / ITERATION_0))
    config.finalize()
    assert (config.pretrained_checkpoint, config.load) == (str(tmp_path / "release"),) * 2


@pytest.mark.parametrize("name", ["iter_0000001", "other", "release.incomplete"])
def test_no_other_name_stands_for_the_release(tmp_path, name):
    make_release(tmp_path)
    assert release_for(tmp_path / name) == tmp_path / name


def test_without_a_release_nothing_stands_for_it(tmp_path):
    (tmp_path / "release").mkdir()
    assert release_for(tmp_path / ITERATION_0) == tmp_path / ITERATION_0
    assert release_for(None) is None


def test_a_link_to_nowhere_is_no_release(tmp_path):
    make_release(tmp_path)
    (tmp_path / ITERATION_0).symlink_to(tmp_path / "gone")
    assert release_for(tmp_path / ITERATION_0) == tmp_path / ITERATION_0


# --- a link ------------------------------------------------------------------------------------------------------


def test_the_link_is_relative_and_the_next_import_without_it_removes_it(hf_model, tmp_path):
    AutoBridge.import_ckpt(hf_model, tmp_path / "out", link_iter_0=True)
    # As somebody moves it.
    root = (tmp_path / "out").rename(tmp_path / "moved")
    assert os.readlink(root / ITERATION_0) == "release"
    assert {path.name for path in root.iterdir()} == {"release", ITERATION_0, TRACKER}
    assert resolve_checkpoint(root) == str(root / "release")
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(root / ITERATION_0, tmp_path / "exported")
    AutoBridge.import_ckpt(hf_model, root, link_iter_0=True)
    assert os.readlink(root / ITERATION_0) == "release"
    AutoBridge.import_ckpt(hf_model, root)
    assert {path.name for path in root.iterdir()} == {"release", TRACKER}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda link: link.mkdir(), "is there already"),
        (lambda link: link.write_text(""), "is there already"),
        (lambda link: link.symlink_to("elsewhere"), "is a link to elsewhere"),
        (lambda link: link.symlink_to(link.parent / "release"), "is a link to /"),
    ],
    ids=["folder", "file", "link to nowhere", "absolute link"],
)
def test_what_stands_in_the_place_of_the_link_is_refused_before_anything_is_read(tmp_path, make, error):
    make_release(tmp_path)
    make(tmp_path / ITERATION_0)
    before = entries(tmp_path)
    with pytest.raises(FileExistsError, match=error):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path, link_iter_0=True)
    assert entries(tmp_path) == before


def test_a_file_system_without_links_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def unsupported(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", unsupported)
    with pytest.raises(OSError, match=r"makes no symbolic links \(Operation not permitted\): import without the link"):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path / "out", link_iter_0=True)
    assert entries(tmp_path) == set()


def test_iteration_0_is_not_written_through_the_link(hf_model, tmp_path):
    AutoBridge.import_ckpt(hf_model, tmp_path, link_iter_0=True)
    before = weights(tmp_path / "release").keys()
    AutoBridge.import_ckpt(hf_model, tmp_path, release=False)
    assert not (tmp_path / ITERATION_0).is_symlink()
    assert names(tmp_path / "release") == PAYLOAD
    assert weights(tmp_path / "release").keys() == before


# --- the layout --------------------------------------------------------------------------------------------------


def test_a_layout_that_nobody_knows_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(LAYOUT_VARIABLE, "0")
    with pytest.raises(ValueError, match=f"{LAYOUT_VARIABLE} is '0', expected 'release' or 'iter'"):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path)


def test_a_link_without_a_release_is_refused(tmp_path):
    with pytest.raises(ValueError, match="iteration 0 was asked for"):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path, release=False, link_iter_0=True)


def test_scripts_that_nobody_can_edit_get_the_layout_by_the_variable(hf_model, tmp_path, monkeypatch):
    monkeypatch.setenv(LAYOUT_VARIABLE, "iter")
    AutoBridge.import_ckpt(hf_model, tmp_path)
    assert (tmp_path / TRACKER).read_text() == "0" and Path(tmp_path, ITERATION_0).is_dir()
