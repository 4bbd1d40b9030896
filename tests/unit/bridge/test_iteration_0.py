# SPDX-License-Identifier: Apache-2.0
"""What callers find who name `iter_0000000`: a stand-in, a link, and the layout of that name."""

import logging
import os
from pathlib import Path

import pytest
from test_release_checkpoint import PAYLOAD, TRACKER, names, save_hf_model, weights
from test_release_layout import entries, object_store, write_iteration, write_release  # noqa: F401 - one is a fixture

from megatron.bridge import AutoBridge
from megatron.bridge.training import iteration_0, release_checkpoint
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.iteration_0 import ITERATION_0, LAYOUT_VARIABLE, release_for, release_wanted


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(autouse=True)
def _no_layout(monkeypatch):
    monkeypatch.delenv(LAYOUT_VARIABLE, raising=False)
    iteration_0._warn_once.cache_clear()


# --- a path that isn't there -------------------------------------------------------------------------------------


def test_iteration_0_beside_a_release_is_the_release_and_said_once(tmp_path, caplog):
    write_release(tmp_path, "payload")
    for path in (tmp_path / ITERATION_0, f"{tmp_path / ITERATION_0}/"):
        for _ in range(2):
            assert release_checkpoint.resolve_checkpoint(path) == str(tmp_path / "release")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"{tmp_path / ITERATION_0} is not there, taking the release checkpoint beside it: use {tmp_path / 'release'}"
    ]


def test_iteration_0_that_is_there_is_taken_as_before(tmp_path, caplog):
    write_release(tmp_path, "payload")
    payload = write_iteration(tmp_path, 0)
    assert release_checkpoint.resolve_checkpoint(payload) == str(payload)
    assert not caplog.records


@pytest.mark.parametrize("name", ["iter_0000001", "other", "release.incomplete"])
def test_no_other_name_stands_for_the_release(tmp_path, name):
    write_release(tmp_path, "payload")
    assert release_for(tmp_path / name) == tmp_path / name


def test_without_a_release_nothing_stands_for_it(tmp_path):
    (tmp_path / "release").mkdir()
    assert release_for(tmp_path / ITERATION_0) == tmp_path / ITERATION_0
    assert release_for(None) is None


def test_a_link_to_nowhere_is_no_release(tmp_path):
    write_release(tmp_path, "payload")
    (tmp_path / ITERATION_0).symlink_to(tmp_path / "gone")
    assert release_for(tmp_path / ITERATION_0) == tmp_path / ITERATION_0


def test_a_training_that_is_to_start_there_starts_from_the_release(tmp_path):
    write_release(tmp_path, "payload")
    config = CheckpointConfig(pretrained_checkpoint=str(tmp_path / ITERATION_0), load=str(tmp_path / ITERATION_0))
    config.finalize()
    assert (config.pretrained_checkpoint, config.load) == (str(tmp_path / "release"),) * 2


def test_in_an_object_store_too(object_store):  # noqa: F811
    root, folder = object_store
    (folder / "release").mkdir(parents=True)
    (folder / "release/metadata.json").touch()
    assert release_checkpoint.resolve_checkpoint(f"{root}/{ITERATION_0}") == f"{root}/release"


# --- a link ------------------------------------------------------------------------------------------------------


def test_the_link_is_relative_and_the_next_import_without_it_removes_it(hf_model, tmp_path):
    AutoBridge.import_ckpt(hf_model, tmp_path / "out", link_iter_0=True)
    # As somebody moves it.
    root = (tmp_path / "out").rename(tmp_path / "moved")
    assert os.readlink(root / ITERATION_0) == "release"
    assert {path.name for path in root.iterdir()} == {"release", ITERATION_0, TRACKER}
    assert release_checkpoint.resolve_checkpoint(root) == str(root / "release")
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(root / ITERATION_0, tmp_path / "exported")
    AutoBridge.import_ckpt(hf_model, root, link_iter_0=True)
    assert os.readlink(root / ITERATION_0) == "release"
    AutoBridge.import_ckpt(hf_model, root)
    assert {path.name for path in root.iterdir()} == {"release", TRACKER}


def test_the_link_is_no_iteration(tmp_path):
    write_release(tmp_path, "payload", link_iter_0=True)
    (tmp_path / TRACKER).unlink()
    assert release_checkpoint.resolve_checkpoint(tmp_path) == str(tmp_path / "release")


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
    write_release(tmp_path, "old")
    make(tmp_path / ITERATION_0)
    before = entries(tmp_path)
    with pytest.raises(FileExistsError, match=error):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path, link_iter_0=True)
    assert entries(tmp_path) == before


def test_a_link_to_elsewhere_is_named_and_left(tmp_path, caplog):
    (tmp_path / ITERATION_0).symlink_to("elsewhere")
    write_release(tmp_path, "payload")
    assert "leads to elsewhere and not to the release" in caplog.text
    assert os.readlink(tmp_path / ITERATION_0) == "elsewhere"


def test_a_file_system_without_links_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def unsupported(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", unsupported)
    with pytest.raises(OSError, match=r"makes no symbolic links \(Operation not permitted\): import without the link"):
        AutoBridge.import_ckpt(tmp_path / "no-model", tmp_path / "out", link_iter_0=True)
    assert entries(tmp_path) == set()


def test_what_a_killed_trial_left_is_cleared_by_the_next_import(tmp_path):
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        (folder / iteration_0._TRIAL).symlink_to("release")
    iteration_0.check_link(tmp_path / "new")
    write_release(tmp_path / "out", "payload")
    assert entries(tmp_path) == {"out", "out/release", "out/release/metadata.json", f"out/{TRACKER}"}


def test_an_object_store_has_no_links(object_store):  # noqa: F811
    root, folder = object_store
    with pytest.raises(ValueError, match="object store, which has no links"):
        release_checkpoint.stage_release(root, link_iter_0=True)
    assert not folder.exists()


def test_iteration_0_is_not_written_through_the_link(hf_model, tmp_path):
    AutoBridge.import_ckpt(hf_model, tmp_path, link_iter_0=True)
    before = weights(tmp_path / "release").keys()
    AutoBridge.import_ckpt(hf_model, tmp_path, release=False)
    assert not (tmp_path / ITERATION_0).is_symlink()
    assert names(tmp_path / "release") == PAYLOAD
    assert weights(tmp_path / "release").keys() == before


# --- the layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("variable", [None, "", "release", "iter"])
@pytest.mark.parametrize("argument", [None, True, False])
def test_the_argument_goes_before_the_variable_and_that_before_the_default(monkeypatch, argument, variable, default):
    if variable is not None:
        monkeypatch.setenv(LAYOUT_VARIABLE, variable)
    expected = {"release": True, "iter": False}.get(variable, default) if argument is None else argument
    assert release_wanted(argument, default) is expected


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


def test_a_save_that_says_nothing_tells_what_megatron_lm_needs(capsys):
    release_wanted(None, default=False)
    assert "pass release=True" in capsys.readouterr().out
    for argument, default in ((False, False), (True, False), (None, True)):
        release_wanted(argument, default)
    assert not capsys.readouterr().out


def test_a_release_is_torch_dist(monkeypatch):
    with pytest.raises(ValueError, match="ckpt_format is 'fsdp_dtensor', a release checkpoint is torch_dist"):
        release_wanted(True, default=False, ckpt_format="fsdp_dtensor")
    monkeypatch.setenv(LAYOUT_VARIABLE, "release")
    assert release_wanted(None, default=False, ckpt_format="fsdp_dtensor") is False
    assert release_wanted(None, default=False) is True
