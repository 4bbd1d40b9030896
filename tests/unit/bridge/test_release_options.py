# SPDX-License-Identifier: Apache-2.0
"""The link `iter_0000000` and the layout from the environment, on folders that hold no weights."""

import os

import pytest
from test_object_store_writer import object_store  # noqa: F401 - a fixture
from test_release_writer import RELEASE_ONLY, entries, write_release

from megatron.bridge.release_checkpoint.layout import ITERATION_0
from megatron.bridge.training import release_options
from megatron.bridge.training.release_options import LAYOUT_VARIABLE, release_wanted


@pytest.fixture(autouse=True)
def _no_layout(monkeypatch):
    monkeypatch.delenv(LAYOUT_VARIABLE, raising=False)


def write_linked(root, link=True):
    write_release(root, "payload", before_tracker=lambda root: release_options.set_link(root, link))


def test_the_link_is_relative_and_the_next_release_without_it_removes_it(tmp_path):
    for _ in range(2):
        write_linked(tmp_path)
        assert os.readlink(tmp_path / ITERATION_0) == "release"
    write_linked(tmp_path, link=False)
    assert entries(tmp_path) == RELEASE_ONLY


def test_a_link_to_elsewhere_is_named_and_left(tmp_path, caplog):
    (tmp_path / ITERATION_0).symlink_to("elsewhere")
    write_linked(tmp_path, link=False)
    assert "leads to elsewhere and not to the release" in caplog.text
    assert os.readlink(tmp_path / ITERATION_0) == "elsewhere"


def test_what_a_killed_trial_left_is_cleared_by_the_next_import(tmp_path):
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        (folder / release_options.TRIAL).symlink_to("release")
    release_options.check_link(tmp_path / "new")
    write_linked(tmp_path / "out", link=False)
    assert entries(tmp_path / "out") == RELEASE_ONLY and {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_object_store_has_no_links(object_store):  # noqa: F811
    root, folder = object_store
    with pytest.raises(ValueError, match="object store, which has no links"):
        release_options.check_link(root)
    assert not folder.exists()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("variable", [None, "", "release", "iter"])
@pytest.mark.parametrize("argument", [None, True, False])
def test_the_argument_goes_before_the_variable_and_that_before_the_default(monkeypatch, argument, variable, default):
    if variable is not None:
        monkeypatch.setenv(LAYOUT_VARIABLE, variable)
    expected = {"release": True, "iter": False}.get(variable, default) if argument is None else argument
    assert release_wanted(argument, default) is expected


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
