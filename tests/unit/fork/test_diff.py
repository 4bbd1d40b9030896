# SPDX-License-Identifier: Apache-2.0
"""The diff of a release for review: what it shows, where it goes, when it is in colour."""

import re
from pathlib import Path

import pytest

from fork import diff
from fork.change import Change
from fork.edits import File, add_parameter
from fork.errors import EditError
from fork.upstream import Upstream


NAME = "megatron_bridge-1.2.3+release.2.diff"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(upstream: Upstream, upstream_wheel: Path, change: Change, modules: Path, tmp_path: Path):
    def write() -> Path:
        return diff.write(tmp_path / "dist", upstream, upstream_wheel, [change], modules)

    return write


def test_diff_shows_edits_modules_and_requirements(write, tmp_path: Path, capfd: pytest.CaptureFixture):
    path = write()
    assert path == tmp_path / "dist" / NAME
    text = path.read_text()
    assert "--- a/megatron/bridge/saving.py\n+++ b/megatron/bridge/saving.py\n" in text
    assert "-def save(path):\n+def save(path, release: bool = False):\n" in text
    assert "+ANSWER = 42\n" in text
    assert '+Requires-Dist: for-gpus==1.0; extra == "cuda"\n' in text
    assert capfd.readouterr().out == text


def test_diff_is_in_colour_where_that_is_asked_for(write, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = write().read_text()
    assert "\x1b[" not in text
    coloured = capfd.readouterr().out
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text
    assert coloured != text
    monkeypatch.setenv("NO_COLOR", "")
    write()
    assert capfd.readouterr().out == text


def test_edit_without_a_place_writes_nothing(upstream: Upstream, upstream_wheel: Path, tmp_path: Path):
    wrong = Change("wrong", "", "", [File("saving.py", [add_parameter("gone", "a=1")])])
    with pytest.raises(EditError, match="change wrong: saving.py: add parameter a to gone"):
        diff.write(tmp_path / "dist", upstream, upstream_wheel, [wrong])
    assert not (tmp_path / "dist").exists()


def test_git_that_is_missing_is_said(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(diff.ForkError, match="expected git, which compares the trees, found none; install it"):
        write()
