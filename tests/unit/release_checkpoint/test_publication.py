# SPDX-License-Identifier: Apache-2.0
"""Links, kills, full disks and other imports while a release checkpoint is published; no weights."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_layout import make_iteration
from test_leftovers import left
from test_release_writer import RELEASE_ONLY, entries

from megatron.bridge.release_checkpoint import files, leftovers
from megatron.bridge.release_checkpoint.files import Staging
from megatron.bridge.release_checkpoint.layout import (
    BRIDGE_TRACKER,
    INCOMPLETE,
    ITERATION_0,
    RELEASE,
    REPLACED,
    TRACKER,
    resolve_checkpoint,
)
from megatron.bridge.release_checkpoint.leftovers import RUNNING, state_of
from megatron.bridge.training import release_writer
from megatron.bridge.training.release_options import set_link
from megatron.bridge.training.release_state import writes_releases
from megatron.bridge.training.release_writer import ReleaseWriter, check_release_target


def write_release(root, text, **hooks):
    """What `save_checkpoint` does."""
    with ReleaseWriter(root) as writer:
        payload = writer.stage()
        writer.run(leftovers.clear, payload)
        Path(payload, "metadata.json").write_text(text)
        writer.publish(**hooks)


def write(root, text, link=False):
    write_release(root, text, before_tracker=lambda root: set_link(root, link))


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_release_folder_behind_a_symlink_is_left_to_its_owner(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "metadata.json").write_text("theirs")
    root = tmp_path / "out"
    root.mkdir()
    (root / "release").symlink_to(elsewhere)
    write_release(root, "new")
    assert (elsewhere / "metadata.json").read_text() == "theirs"
    assert (root / "release/metadata.json").read_text() == "new"


def test_links_that_lie_where_an_import_writes_are_not_followed(tmp_path):
    victim, folder, root = tmp_path / "victim", tmp_path / "folder", tmp_path / "out"
    victim.write_text("kept")
    folder.mkdir()
    (folder / "file").write_text("kept")
    root.mkdir()
    links = {
        TRACKER + INCOMPLETE: victim,
        RELEASE + INCOMPLETE: folder,
        REPLACED: folder,
        left(root / RELEASE).name: folder,
    }
    for name, target in links.items():
        files.remove(root / name)
        (root / name).symlink_to(target)
    write_release(root, "payload")
    assert victim.read_text() == "kept" and (folder / "file").read_text() == "kept"
    assert not (root / "release").is_symlink() and (root / "release/metadata.json").read_text() == "payload"
    # Nobody knows whose they are.
    assert {path.name for path in root.iterdir()} == {"release", TRACKER, *links}


def test_a_symlinked_root_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_release(tmp_path / "link", "payload")
    assert (tmp_path / "real/release/metadata.json").read_text() == "payload"


def test_a_release_replaces_a_release(tmp_path):
    write_release(tmp_path, "old")
    write_release(tmp_path, "new")
    assert (tmp_path / "release/metadata.json").read_text() == "new"
    assert entries(tmp_path) == RELEASE_ONLY


# --- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: no handler in the code under test may run for it."""


def kill_at(monkeypatch, step):
    """Let the `step`-th change to the file system, counted from 0, not happen, nor any after it."""
    done = []

    def counted(change):
        def wrapper(*args, **kwargs):
            if len(done) >= step:
                # The kernel ends the locks of a killed process, and nobody removes what it staged.
                monkeypatch.setattr(Staging, "close", end_locks)
                raise Killed
            done.append(change)
            return change(*args, **kwargs)

        return wrapper

    def end_locks(staging):
        if staging._lock is not None:
            os.close(staging._lock)
            staging._lock = None

    # No process has this number.
    monkeypatch.setattr(os, "getpid", lambda: 2**40)
    changes = (
        (Path, ("rename", "replace", "unlink", "mkdir", "symlink_to")),
        (shutil, ("rmtree",)),
        (files, ("exchange",)),
        (release_writer, ("write_new",)),
    )
    for owner, names in changes:
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return done


def write_train_state(root, step):
    torch.save({"step": torch.tensor(step)}, root / BRIDGE_TRACKER)


def save_iteration_0(root):
    make_iteration(root, 0)
    (root / TRACKER).write_text("0")
    write_train_state(root, 0)


BEFORE = {
    "nothing": lambda root: None,
    "a release": lambda root: write_release(root, "old"),
    "iteration 0": save_iteration_0,
    "a crashed import": lambda root: left(root / RELEASE),
}


@pytest.fixture(params=["exchange", "two renames"])
def exchanges(request, monkeypatch):
    """Whether the file system can swap two folders in one step, as that of the tests can."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "exchange", lambda *args: False)
    return request.param == "exchange"


@pytest.mark.parametrize("link", [False, True], ids=["", "with a link"])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("step", range(18))
def test_a_kill_at_any_step_leaves_the_old_checkpoint_or_the_new_one_or_none(
    tmp_path, monkeypatch, before, step, exchanges, link, record_property
):
    record_property("count of publications of a release killed, at each change in turn", 1)
    root = tmp_path / "out"
    BEFORE[before](root)
    link = link and not (root / ITERATION_0).exists()
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with suppress(Killed):
            write(root, "new", link)
    tracker = root / TRACKER
    if tracker.exists():
        named = Path(resolve_checkpoint(root))
        assert (named / "metadata.json").read_text() in {"old", "new", "iteration 0"}
        # Made before the tracker, and seen to lead where that leads.
        assert not (root / ITERATION_0).is_symlink() or (root / ITERATION_0).resolve() == named.resolve()
    assert tracker.exists() or before not in ("iteration 0", *(["a release"] if exchanges else []))

    write(root, "next")
    assert (Path(resolve_checkpoint(root)) / "metadata.json").read_text() == "next"
    assert entries(root) <= RELEASE_ONLY | {ITERATION_0, f"{ITERATION_0}/metadata.json"}


@pytest.mark.parametrize("link", [False, True], ids=["", "with a link"])
def test_the_steps_above_are_all_of_them(tmp_path, monkeypatch, exchanges, link):
    write_release(tmp_path, "old")
    with monkeypatch.context() as patch:
        done = kill_at(patch, 100)
        write(tmp_path, "new", link)
    assert 5 < len(done) <= 18


def test_a_disk_that_is_full_at_the_tracker_leaves_the_old_release(tmp_path, monkeypatch, exchanges):
    def disk_full(*args):
        raise OSError(28, "No space left on device")

    write_release(tmp_path, "old")
    with (
        pytest.raises(OSError, match="No space left"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(release_writer, "write_new", disk_full)
        write_release(tmp_path, "new")
    assert (tmp_path / "release/metadata.json").read_text() == "old"
    assert entries(tmp_path) == RELEASE_ONLY


def test_an_old_release_that_can_not_be_removed_does_not_fail_the_import(tmp_path, monkeypatch, caplog):
    def busy(*args):
        raise OSError(39, "Directory not empty")

    write_release(tmp_path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        write_release(tmp_path, "new")
    assert "could not be removed, the next import tries again" in caplog.text
    assert (Path(resolve_checkpoint(tmp_path)) / "metadata.json").read_text() == "new"
    write_release(tmp_path, "next")
    assert entries(tmp_path) == RELEASE_ONLY


@pytest.fixture
def removed_while_locked(monkeypatch):
    """The folders that were removed since; another import can't lock one of them meanwhile."""

    def other_import(folder):
        assert state_of(folder.parent) == RUNNING
        removed.append(folder.relative_to(folder.parents[1]).as_posix().partition(".incomplete.")[0])
        remove(folder)

    remove, removed = shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", other_import)
    return removed


def test_the_old_release_is_no_leftover_while_its_successor_is_published(tmp_path, removed_while_locked):
    write_release(tmp_path, "old")
    assert removed_while_locked == []
    write_release(tmp_path, "new")
    assert removed_while_locked == [RELEASE]


def test_what_is_discarded_is_still_locked(tmp_path, removed_while_locked):
    with ReleaseWriter(tmp_path) as writer:
        writer.stage()
    assert removed_while_locked == [RELEASE]


# --- targets that are refused ------------------------------------------------------------------------------------


def file_as_root(root):
    root.write_text("")
    return NotADirectoryError, "is a file"


def training_tracker(root):
    make_iteration(root, 5)
    (root / TRACKER).write_text("5")
    write_train_state(root, 5)
    return FileExistsError, "training iteration 5"


def training_without_tracker(root):
    make_iteration(root, 7)
    return FileExistsError, "training iteration 7"


def training_beside_a_release(root):
    write_release(root, "old")
    make_iteration(root, 3)
    return FileExistsError, "training iteration 3"


def unreadable_tracker(root):
    root.mkdir()
    (root / TRACKER).write_text("yesterday")
    return ValueError, "holds 'yesterday', expected an iteration or 'release'"


@pytest.mark.parametrize(
    "make", [file_as_root, training_tracker, training_without_tracker, training_beside_a_release, unreadable_tracker]
)
def test_a_target_is_refused_and_left_alone(tmp_path, make):
    root = tmp_path / "out"
    error, message = make(root)
    before = entries(tmp_path)
    with pytest.raises(error, match=message) as caught, ReleaseWriter(root) as writer:
        writer.stage()
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == before


@pytest.mark.parametrize("iteration", [3, 5])
def test_a_root_with_training_is_refused_and_left_alone(tmp_path, iteration):
    make_iteration(tmp_path, iteration)
    before = entries(tmp_path)
    with pytest.raises(FileExistsError, match=f"training iteration {iteration}"), ReleaseWriter(tmp_path) as writer:
        writer.stage()
    assert entries(tmp_path) == before


@pytest.mark.parametrize("over", [False, True], ids=["into nothing", "over a release"])
@pytest.mark.parametrize("link", [False, True], ids=["", "with a link"])
@pytest.mark.parametrize("moment", ["before the swap", "before the tracker"])
def test_a_training_that_saves_meanwhile_keeps_its_tracker(tmp_path, exchanges, over, link, moment):
    """As Megatron-LM saves, which takes no lock: first its folder, then the tracker."""
    if over:
        write(tmp_path, "old", link=not link)
    with pytest.raises(FileExistsError, match="training iteration 2"), ReleaseWriter(tmp_path) as writer:
        Path(writer.stage(), "metadata.json").write_text("new")

        def train(root):
            undo = set_link(root, link) if moment == "before the tracker" else None
            make_iteration(root, 2)
            (root / TRACKER).write_text("2")
            return undo

        if moment == "before the swap":
            train(tmp_path)
        writer.publish(before_tracker=train)
    assert (tmp_path / TRACKER).read_text() == "2"
    was = {ITERATION_0} if over and not link else set()
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000002", *({RELEASE} if over else ()), *was}
    assert not over or (tmp_path / "release/metadata.json").read_text() == "old"


def test_a_training_that_has_only_begun_to_save_is_seen(tmp_path, exchanges):
    write(tmp_path, "old")
    with pytest.raises(FileExistsError, match="training iteration 2"):
        write_release(tmp_path, "new", before_tracker=lambda root: make_iteration(root, 2) and None)
    assert (tmp_path / TRACKER).read_text() == "release"
    assert (tmp_path / "release/metadata.json").read_text() == "old"


def test_a_target_that_can_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            check_release_target(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(PermissionError, match="is not writable"):
        check_release_target(tmp_path / "out")


def test_a_release_takes_over_from_iteration_0_and_removes_the_tracker_that_contradicts_it(tmp_path):
    old = make_iteration(tmp_path, 0)
    (tmp_path / TRACKER).write_text("0")
    write_train_state(tmp_path, 0)
    write_release(tmp_path, "new")
    assert (tmp_path / TRACKER).read_text() == "release"
    assert not (tmp_path / BRIDGE_TRACKER).exists()
    assert (old / "metadata.json").read_text() == "iteration 0"


# --- save_checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_save_checkpoint_gets_a_writer_that_discards_on_an_error(tmp_path, fails):
    @writes_releases(ReleaseWriter)
    def save_checkpoint(state, writer=None):
        if writer is not None:
            writer.stage()
            if fails:
                raise KeyboardInterrupt
            writer.publish()

    state = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path), async_save=False)))
    if fails:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(state, release=True)
    else:
        save_checkpoint(state)
        save_checkpoint(state, release=True)
    assert (tmp_path / "release").is_dir() is not fails
    assert not list(tmp_path.glob("release.incomplete*"))


def test_a_deferred_writer_publishes_after_the_block_or_discards(tmp_path):
    with ReleaseWriter(tmp_path, deferred=True) as writer:
        Path(writer.stage(), "metadata.json").touch()
    with pytest.raises(ZeroDivisionError):
        writer.run(lambda: 1 / 0)
    assert entries(tmp_path) == set()
    with ReleaseWriter(tmp_path, deferred=True) as writer:
        Path(writer.stage(), "metadata.json").touch()
    writer.publish()
    assert entries(tmp_path) == RELEASE_ONLY


def test_two_writers_of_one_root_do_not_mix(tmp_path):
    with ReleaseWriter(tmp_path) as first:
        first.stage()
        with pytest.raises(FileExistsError, match="another process is writing"):
            write_release(tmp_path, "second")
        assert len(list(tmp_path.iterdir())) == 1
    write_release(tmp_path, "afterwards")
