# SPDX-License-Identifier: Apache-2.0
"""A release of the fork: the wheels, their checksums, and the notes from the changelog."""

import hashlib
from pathlib import Path

import pytest

from fork import backend, release
from fork.errors import ForkError
from fork.upstream import Upstream


LOG = f"""\
# Changelog

## [Unreleased]

- later

## [{release.TAG}] - 2026-11-22

### Added

- this

## [release.0] - 2026-11-01

- old
"""


@pytest.fixture
def changelog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "CHANGELOG.md"
    path.write_text(LOG)
    monkeypatch.setattr(release, "CHANGELOG", path)
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch):
    """Stands for a build: a file of the name that a wheel has."""

    def build(folder: Path, upstream: Upstream) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{backend.stem(upstream)}-py3-none-any.whl"
        path.write_bytes(upstream.version.encode())
        return path

    monkeypatch.setattr(backend, "build", build)


RELEASES = [Upstream("1.2.3", "", "0.1.4", "5.0.0"), Upstream("1.3.0", "", "0.2.0", "5.1.0")]


def test_release_has_wheels_checksums_and_notes(changelog: Path, built: None, tmp_path: Path):
    wheels = release.make(tmp_path / "out", releases=RELEASES)
    assert [wheel.name for wheel in wheels] == [f"{backend.stem(each)}-py3-none-any.whl" for each in RELEASES]
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}" for wheel in wheels]
    notes = (tmp_path / "out" / "notes.md").read_text()
    assert notes.startswith("### Added\n\n- this\n\n| wheel | Megatron-Bridge |")
    assert f"| `{wheels[1].name}` | 1.3.0 | 0.2.0 | 5.1.0 |\n" in notes


def test_tag_of_other_sources_is_refused(changelog: Path, built: None, tmp_path: Path):
    with pytest.raises(ForkError, match=r"the tag release.99 is not that of these sources"):
        release.make(tmp_path / "out", "release.99", RELEASES)
    assert not (tmp_path / "out").exists()


def test_release_that_the_changelog_lacks_is_refused(changelog: Path, built: None, tmp_path: Path):
    changelog.write_text("## [Unreleased]\n\n- this\n")
    with pytest.raises(ForkError, match=rf"CHANGELOG.md has no section \[{release.TAG}\]; give what is under"):
        release.make(tmp_path / "out", releases=RELEASES)
    assert not (tmp_path / "out").exists()
