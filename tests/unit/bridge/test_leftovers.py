# SPDX-License-Identifier: Apache-2.0
"""Which staging folders are removed, which stay, and who goes on of several processes."""

import os
from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint import leftovers
from megatron.bridge.release_checkpoint.files import HOST, OWNER, Staging
from megatron.bridge.release_checkpoint.leftovers import LEFT, RUNNING, UNKNOWN, clear, state_of


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "release"


def opened(target: Path) -> Staging:
    staging = Staging(target)
    staging.open()
    return staging


def left(target: Path) -> Path:
    """A staging folder whose process was killed."""
    staging = opened(target)
    (staging.payload / "weights").write_text("half")
    os.close(staging._lock)
    return staging.folder


def test_a_leftover_is_removed_and_a_running_process_is_not_disturbed(target: Path):
    old = left(target)
    staging = opened(target)
    assert (state_of(old), state_of(staging.folder)) == (LEFT, RUNNING)
    clear(staging.payload)
    assert list(target.parent.iterdir()) == [staging.folder]


def test_the_second_of_two_is_refused(target: Path):
    first, second = opened(target), opened(target)
    os.utime(second.folder / OWNER, ns=(0, (first.folder / OWNER).stat().st_mtime_ns + 1))
    clear(first.payload)
    with pytest.raises(FileExistsError, match="another process is writing to .*: wait for it, or pass a different"):
        clear(second.payload)
    assert first.payload.is_dir()


def without_a_file(folder: Path) -> None:
    (folder / OWNER).unlink()


def of_another_name(folder: Path) -> None:
    (folder / OWNER).write_text((folder / OWNER).read_text().replace("-", "_"))


@pytest.mark.parametrize("change", [without_a_file, of_another_name])
def test_what_is_not_known_to_be_a_leftover_is_named_and_stays(target: Path, change, caplog):
    change(other := left(target))
    (target.parent / "release.incomplete").mkdir()
    clear(opened(target).payload)
    assert (other / "release/weights").read_text() == "half" and state_of(other) == UNKNOWN
    assert {f"{each} stays" in caplog.text for each in (other, target.with_name("release.incomplete"))} == {True}


def test_the_folder_of_another_host_stays(target: Path):
    other = left(target)
    moved = other.rename(other.with_name(other.name.replace(HOST, "elsewhere")))
    (moved / OWNER).write_text(f"{moved.name} is theirs")
    assert state_of(moved) == UNKNOWN


def test_without_locks_nothing_is_known(target: Path, monkeypatch):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(leftovers.fcntl, "flock", no_locks)
    other = left(target)
    clear(opened(target).payload)
    assert (other / "release/weights").exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_that_has_only_begun_is_told_from_one_that_was_killed(target: Path, alive):
    target.parent.mkdir()
    folder = target.with_name(f"release.incomplete.{HOST}-{os.getpid() if alive else 2**40}-01234567")
    folder.mkdir()
    assert state_of(folder) == (UNKNOWN if alive else LEFT)
    (folder / OWNER).touch()
    assert state_of(folder) == (UNKNOWN if alive else LEFT)
    (folder / "mine").touch()
    assert state_of(folder) == UNKNOWN


def test_the_only_copy_of_a_target_is_put_back(target: Path):
    other = left(target)
    (other / "release.replaced").mkdir()
    (other / "release.replaced/weights").write_text("old")
    clear(opened(target).payload)
    assert not other.exists() and (target / "weights").read_text() == "old"
