# SPDX-License-Identifier: Apache-2.0
"""Staging, publication and resolution of a release checkpoint, on folders that hold no weights."""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megatron.bridge.training import release_checkpoint as rc
from megatron.bridge.training.iteration_0 import ITERATION_0
from megatron.bridge.training.state import TrainState


TRACKER = "latest_checkpointed_iteration.txt"


def write_release(root, text, link_iter_0=False):
    payload = Path(rc.stage_release(root, link_iter_0))
    (payload / "metadata.json").write_text(text)
    rc.publish_release(root)


def write_iteration(root, iteration, tracker=None, train_state=None):
    payload = root / f"iter_{iteration:07d}"
    payload.mkdir(parents=True)
    (payload / "metadata.json").write_text(f"iteration {iteration}")
    if tracker is not None:
        (root / TRACKER).write_text(tracker)
    if train_state is not None:
        torch.save(TrainState(step=train_state).state_dict(), root / "latest_train_state.pt")
    return payload


def entries(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


# --- publication -------------------------------------------------------------------------------------------------


def test_a_release_is_the_payload_and_a_tracker(tmp_path):
    root = tmp_path / "new" / "out"
    write_release(root, "payload")
    assert entries(root) == {"release", "release/metadata.json", TRACKER}
    assert (root / TRACKER).read_text() == "release"


def test_nothing_changes_before_publication(tmp_path):
    write_release(tmp_path, "old")
    payload = Path(rc.stage_release(tmp_path))
    (payload / "metadata.json").write_text("new")
    assert payload.parent == tmp_path
    assert (tmp_path / "release/metadata.json").read_text() == "old"
    assert (tmp_path / TRACKER).read_text() == "release"
    rc.discard_release(tmp_path)


def test_a_release_replaces_a_release(tmp_path):
    write_release(tmp_path, "old")
    write_release(tmp_path, "new")
    assert (tmp_path / "release/metadata.json").read_text() == "new"
    assert entries(tmp_path) == {"release", "release/metadata.json", TRACKER}


def test_a_release_takes_over_from_iteration_0_and_removes_the_tracker_that_contradicts_it(tmp_path):
    old = write_iteration(tmp_path, 0, tracker="0", train_state=0)
    write_release(tmp_path, "new")
    assert (tmp_path / TRACKER).read_text() == "release"
    assert not (tmp_path / "latest_train_state.pt").exists()
    assert (old / "metadata.json").read_text() == "iteration 0"


def test_a_discarded_release_leaves_nothing(tmp_path):
    root = tmp_path / "deeply" / "nested" / "out"
    with pytest.raises(KeyboardInterrupt), rc.discarded_on_error(root):
        (Path(rc.stage_release(root)) / "metadata.json").write_text("half")
        raise KeyboardInterrupt
    assert entries(tmp_path) == set()


def test_a_discarded_release_leaves_the_old_one(tmp_path):
    write_release(tmp_path, "old")
    with pytest.raises(OSError, match="disk full"), rc.discarded_on_error(tmp_path):
        rc.stage_release(tmp_path)
        raise OSError("disk full")
    assert entries(tmp_path) == {"release", "release/metadata.json", TRACKER}


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
    (root / f"{TRACKER}.incomplete").symlink_to(victim)
    (root / rc.STAGING_DIR).symlink_to(folder)
    (root / rc.REPLACED_DIR).symlink_to(folder)
    write_release(root, "payload")
    assert victim.read_text() == "kept" and (folder / "file").read_text() == "kept"
    assert not (root / "release").is_symlink() and (root / "release/metadata.json").read_text() == "payload"
    assert {path.name for path in root.iterdir()} == {"release", TRACKER}


def test_a_symlinked_root_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_release(tmp_path / "link", "payload")
    assert (tmp_path / "real/release/metadata.json").read_text() == "payload"


class Killed(BaseException):
    """Stands for a kill: no handler in the code under test may run for it."""


def kill_at(monkeypatch, step):
    """Let the `step`-th change to the file system, counted from 0, not happen, nor any after it."""
    done = []

    def counted(change):
        def wrapper(*args, **kwargs):
            if len(done) >= step:
                raise Killed
            done.append(change)
            return change(*args, **kwargs)

        return wrapper

    changes = (
        (Path, ("rename", "replace", "unlink", "mkdir", "symlink_to")),
        (shutil, ("rmtree",)),
        (rc, ("_exchange", "write_new")),
    )
    for owner, names in changes:
        for name in names:
            monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return done


BEFORE = {
    "nothing": lambda root: None,
    "a release": lambda root: write_release(root, "old"),
    "iteration 0": lambda root: write_iteration(root, 0, tracker="0", train_state=0),
    "a crashed import": lambda root: (root / rc.STAGING_DIR / "rest").mkdir(parents=True),
}


@pytest.fixture(params=["exchange", "two renames"])
def exchanges(request, monkeypatch):
    """Whether the file system can swap two folders in one step, as that of the tests can."""
    if request.param == "two renames":
        monkeypatch.setattr(rc, "_exchange", lambda *args: False)
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
            write_release(root, "new", link)
    tracker = root / TRACKER
    if tracker.exists():
        named = Path(rc.resolve_checkpoint(root))
        assert (named / "metadata.json").read_text() in {"old", "new", "iteration 0"}
        # Made before the tracker, and seen to lead where that leads.
        assert not (root / ITERATION_0).is_symlink() or (root / ITERATION_0).resolve() == named.resolve()
    assert tracker.exists() or before not in ("iteration 0", *(["a release"] if exchanges else []))

    write_release(root, "next")
    assert (Path(rc.resolve_checkpoint(root)) / "metadata.json").read_text() == "next"
    assert entries(root) <= {"release", "release/metadata.json", TRACKER, "iter_0000000", "iter_0000000/metadata.json"}


@pytest.mark.parametrize("link", [False, True], ids=["", "with a link"])
def test_the_steps_above_are_all_of_them(tmp_path, monkeypatch, exchanges, link):
    write_release(tmp_path, "old")
    with monkeypatch.context() as patch:
        done = kill_at(patch, 100)
        write_release(tmp_path, "new", link)
    assert 5 < len(done) <= 18


def test_a_disk_that_is_full_at_the_tracker_leaves_the_old_release(tmp_path, monkeypatch, exchanges):
    def disk_full(*args):
        raise OSError(28, "No space left on device")

    write_release(tmp_path, "old")
    with (
        pytest.raises(OSError, match="No space left"),
        monkeypatch.context() as patch,
        rc.discarded_on_error(tmp_path),
    ):
        patch.setattr(rc, "write_new", disk_full)
        (Path(rc.stage_release(tmp_path)) / "metadata.json").touch()
        rc.publish_release(tmp_path)
    assert (tmp_path / "release/metadata.json").read_text() == "old"
    assert entries(tmp_path) == {"release", "release/metadata.json", TRACKER}


def test_an_old_release_that_can_not_be_removed_does_not_fail_the_import(tmp_path, monkeypatch, caplog):
    def busy(*args):
        raise OSError(39, "Directory not empty")

    write_release(tmp_path, "old")
    with monkeypatch.context() as patch:
        (Path(rc.stage_release(tmp_path)) / "metadata.json").write_text("new")
        patch.setattr(shutil, "rmtree", busy)
        rc.publish_release(tmp_path)
    assert "could not be removed, the next import tries again" in caplog.text
    assert (Path(rc.resolve_checkpoint(tmp_path)) / "metadata.json").read_text() == "new"
    write_release(tmp_path, "next")
    assert entries(tmp_path) == {"release", "release/metadata.json", TRACKER}


@pytest.fixture
def removed_while_locked(monkeypatch):
    """The folders that were removed since; another import can't lock one of them meanwhile."""

    def other_import(folder):
        with pytest.raises(FileExistsError, match="another process is writing"):
            rc._lock(folder)
        removed.append(folder)
        remove(folder)

    remove, removed = shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", other_import)
    return removed


def test_the_old_release_is_no_leftover_while_its_successor_is_published(tmp_path, removed_while_locked):
    write_release(tmp_path, "old")
    assert removed_while_locked == []
    write_release(tmp_path, "new")
    assert removed_while_locked == [tmp_path / rc.STAGING_DIR]


def test_what_is_discarded_is_still_locked(tmp_path, removed_while_locked):
    rc.stage_release(tmp_path)
    rc.discard_release(tmp_path)
    assert removed_while_locked == [tmp_path / rc.STAGING_DIR]


def test_two_imports_into_one_root_do_not_mix(tmp_path):
    staging = tmp_path / rc.STAGING_DIR
    staging.mkdir()
    other = os.open(staging, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(FileExistsError, match="another process is writing"):
            rc.stage_release(tmp_path)
    finally:
        os.close(other)
    write_release(tmp_path, "afterwards")


# --- targets that are refused ------------------------------------------------------------------------------------


def file_as_root(root):
    root.write_text("")
    return NotADirectoryError, "is a file"


def training_tracker(root):
    write_iteration(root, 5, tracker="5", train_state=5)
    return FileExistsError, "training iteration 5"


def training_without_tracker(root):
    write_iteration(root, 7)
    return FileExistsError, "training iteration 7"


def training_beside_a_release(root):
    write_release(root, "old")
    write_iteration(root, 3)
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
    with pytest.raises(error, match=message) as caught:
        rc.stage_release(root)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == before


def test_a_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        rc.check_release_target(tmp_path / "file" / "out")


def test_a_target_that_can_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(PermissionError, match="is not writable"):
        rc.check_release_target(tmp_path / "out")


# --- resolution --------------------------------------------------------------------------------------------------


def test_the_tracker_decides(tmp_path):
    write_release(tmp_path, "release")
    iteration = write_iteration(tmp_path, 9)
    assert rc.resolve_checkpoint(tmp_path) == str(tmp_path / "release")
    (tmp_path / TRACKER).write_text("9\n")
    assert rc.resolve_checkpoint(tmp_path) == str(iteration)


def test_a_payload_folder_is_taken_as_it_is(tmp_path):
    write_release(tmp_path, "release")
    write_iteration(tmp_path, 9)
    for name in ("release", "iter_0000009"):
        assert rc.resolve_checkpoint(tmp_path / name) == str(tmp_path / name)


def test_without_a_tracker_the_train_state_decides_then_the_highest_iteration_then_the_release(tmp_path):
    (tmp_path / "release").mkdir()
    assert rc.resolve_checkpoint(tmp_path) == str(tmp_path / "release")
    write_iteration(tmp_path, 10)
    write_iteration(tmp_path, 9)
    assert rc.resolve_checkpoint(tmp_path) == str(tmp_path / "iter_0000010")
    torch.save(TrainState(step=9).state_dict(), tmp_path / "latest_train_state.pt")
    assert rc.resolve_checkpoint(tmp_path) == str(tmp_path / "iter_0000009")


def test_a_folder_without_checkpoints_resolves_to_itself(tmp_path):
    assert rc.resolve_checkpoint(tmp_path) == str(tmp_path)
    assert rc.resolve_checkpoint(tmp_path / "missing") == str(tmp_path / "missing")


def test_a_tracker_that_names_a_missing_folder_is_an_error(tmp_path):
    (tmp_path / TRACKER).write_text("12")
    with pytest.raises(FileNotFoundError, match="names iter_0000012, which is not there"):
        rc.resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tracker", "step", "trusted"), [("5", 5, True), (None, 5, True), ("8", 5, False), ("release", 5, False)]
)
def test_the_train_state_is_trusted_only_where_it_agrees_with_the_tracker(tmp_path, tracker, step, trusted):
    torch.save(TrainState(step=step).state_dict(), tmp_path / "latest_train_state.pt")
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert rc.train_state_tracker(tmp_path) == (str(tmp_path / "latest_train_state.pt") if trusted else "")


def test_an_iteration_of_megatron_lm_borrows_the_run_config_of_the_release_beside_it(tmp_path):
    write_release(tmp_path, "release")
    iteration = write_iteration(tmp_path, 4)
    assert rc.run_config_folder(iteration) == str(iteration)
    (tmp_path / "release/run_config.yaml").write_text("{}")
    assert rc.run_config_folder(iteration) == str(tmp_path / "release")
    (iteration / "run_config.yaml").write_text("{}")
    assert rc.run_config_folder(iteration) == str(iteration)


# --- MultiStorageClient ------------------------------------------------------------------------------------------


@pytest.fixture
def object_store(tmp_path, monkeypatch):
    """The URL of a MultiStorageClient profile, and the local folder below which its objects lie."""
    pytest.importorskip("multistorageclient")
    from megatron.core.msc_utils import MultiStorageClientFeature

    # The client is cached by profile, so each test has its own.
    profile = tmp_path.name.replace("_", "-")
    store = tmp_path / "store"
    store.mkdir()
    config = tmp_path / "msc.yaml"
    provider = f"{{type: file, options: {{base_path: {store}}}}}"
    config.write_text(f"profiles:\n  {profile}:\n    storage_provider: {provider}\n")
    monkeypatch.setenv("MSC_CONFIG", str(config))
    MultiStorageClientFeature.enable()
    yield f"msc://{profile}/out", store / "out"
    MultiStorageClientFeature.disable()


def test_a_release_in_an_object_store_is_written_in_place_with_the_tracker_last(object_store):
    from megatron.core.msc_utils import MultiStorageClientFeature

    msc = MultiStorageClientFeature.import_package()
    root, folder = object_store
    for text in ("old", "new"):
        payload = rc.stage_release(root)
        assert payload == f"{root}/release"
        assert not (folder / TRACKER).exists()
        msc.Path(f"{payload}/metadata.json").write_text(text)
        rc.publish_release(root)
    assert (folder / "release/metadata.json").read_text() == "new"
    assert (folder / TRACKER).read_text() == "release"
    assert rc.resolve_checkpoint(root) == f"{root}/release"


def test_an_object_store_that_holds_training_iterations_is_refused(object_store):
    root, folder = object_store
    write_iteration(folder, 5, tracker="5")
    with pytest.raises(FileExistsError, match="training iteration 5"):
        rc.stage_release(root)


def test_a_local_path_is_staged_with_multistorageclient_enabled_too(object_store, tmp_path):
    assert rc.stage_release(tmp_path / "local") == str(tmp_path / "local" / rc.STAGING_DIR)
    rc.discard_release(tmp_path / "local")
