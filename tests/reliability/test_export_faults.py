# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with an import, for an export: kills, full disks, other users, two at once, ranks that die.

The folder that is exported to is what counts, so most of these exports write a few small files and no model.
"""

import resource
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import (
    AutoBridge,
    Child,
    alone,
    meeting_place,
    names,
    on_rank,
    on_two_ranks,
    run,
    run_forked,
    save_hf_model,
)
from kills import killed_at_change
from safetensors.torch import load_file
from test_faults import (
    BY_TWO,
    MS_RDONLY,
    MS_REMOUNT,
    in_fork,
    in_namespace,
    mount,
    over,  # noqa: F401
    run_and_end,
    run_in_two,
    said_by,
    used_kib,
    with_two,
)

from megatron.bridge.models.hf_pretrained.export_staging import exports_whole


OLD = {"config.json": b"old", "model.safetensors": b"old", "notes.txt": b"mine"}
NEW = {
    "config.json": b"new",
    "model.safetensors.index.json": b"new",
    "model-00001-of-00002.safetensors": b"new" * 40_000,
}
WHOLE = {False: NEW, True: NEW | {"notes.txt": b"mine"}}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@exports_whole
def export_ckpt(bridge, megatron_path, hf_path):
    write(Path(hf_path), NEW)
    bridge.then()


ROADS = {"one process": alone, "two processes": on_two_ranks}


@pytest.fixture(params=with_two(ROADS))
def road(request):
    return request.param


def export(hf: Path, over: bool, then=lambda: None) -> None:  # noqa: F811
    pretrained = SimpleNamespace(model_name_or_path=None)
    export_ckpt(SimpleNamespace(hf_pretrained=pretrained, then=then), hf.parent / "checkpoint", hf, overwrite=over)


def export_on(road: str, hf: Path, over: bool) -> None:  # noqa: F811
    ROADS[road](partial(export, hf, over))


def prepare(hf: Path, over: bool) -> Path:  # noqa: F811
    (hf if over else hf.parent).mkdir(parents=True, exist_ok=True)
    if over:
        write(hf, OLD)
    return hf


def assert_unharmed(hf: Path, over: bool) -> None:  # noqa: F811
    assert names(hf.parent) == ({hf.name} if over else set()) and contents(hf) == (OLD if over else None)


def assert_exported(hf: Path, over: bool) -> None:  # noqa: F811
    assert names(hf.parent) == {hf.name} and contents(hf) == WHOLE[over]


# --- kills -------------------------------------------------------------------------------------------------------


def test_a_kill_at_each_change_leaves_the_old_export_or_the_new_one_or_none(tmp_path, over, record_property):  # noqa: F811
    seen = set()
    for number in range(100):
        hf = prepare(tmp_path / str(number) / "hf", over)
        # The staging folder begins with the name of the export.
        said = run_forked(partial(killed_at_change, number, hf, partial(export, hf, over)))
        there = contents(hf)
        assert there in ((OLD if over else None), WHOLE[over])
        seen.add(there == WHOLE[over])
        export(hf, overwrite_after(there))
        assert_exported(hf, over)
        if said.get("error") != "killed":
            break
    assert 8 < number < 99 and seen == {False, True}
    record_property("count of exports killed, at each change in turn", number)


def overwrite_after(there) -> bool:
    return there is not None


def interrupt() -> None:
    # A job in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path, over):  # noqa: F811
    hf = prepare(tmp_path / "hf", over)
    with pytest.raises(KeyboardInterrupt):
        export(hf, over, then=interrupt)
    assert_unharmed(hf, over)


# --- the file system ---------------------------------------------------------------------------------------------


def on_small_disk(folder: Path, over: bool, road: str, free_kib: int) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    hf = prepare(disk / "hf", over)
    mount(disk, max(used_kib(disk) + free_kib, 4), MS_REMOUNT)
    said = said_by(partial(export_on, road, hf, over))
    assert_unharmed(hf, over)
    mount(disk, 1 << 20, MS_REMOUNT)
    export_on(road, hf, over)
    assert_exported(hf, over)
    return said


@pytest.mark.parametrize("free_kib", [0, 8, 64])
def test_an_export_onto_a_full_disk(tmp_path, over, road, free_kib, record_property):  # noqa: F811
    said = in_fork(partial(on_small_disk, tmp_path / "disk", over, road, free_kib))
    assert "No space left on device" in said or "GB left, expected" in said
    record_property("count of exports onto a full disk", 1)


def with_quota(hf: Path, over: bool, road: str) -> str:  # noqa: F811
    prepare(hf, over)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = said_by(partial(export_on, road, hf, over))
    assert_unharmed(hf, over)
    return said


def test_an_export_whose_files_may_grow_no_further(tmp_path, over, road):  # noqa: F811
    assert "File too large" in in_fork(partial(with_quota, tmp_path / "out" / "hf", over, road))


def on_read_only_disk(folder: Path, over: bool, road: str) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    hf = prepare(disk / "hf", over)
    mount(disk, 1 << 20, MS_REMOUNT | MS_RDONLY)
    said = said_by(partial(export_on, road, hf, over))
    assert_unharmed(hf, over)
    return said


def test_an_export_onto_a_read_only_disk(tmp_path, over, road):  # noqa: F811
    assert "is not writable: change its" in in_fork(partial(on_read_only_disk, tmp_path / "disk", over, road))


def onto_mount(folder: Path) -> str:
    in_namespace()
    return said_by(partial(export, mount(folder, 1 << 20), None))


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path):
    said = in_fork(partial(onto_mount, tmp_path / "disk"))
    assert f"is a mount point, which an export can't replace: pass a folder in it, {tmp_path}/disk/hf" in said


def without_permission(hf: Path, over: bool, road: str) -> str:  # noqa: F811
    in_namespace(mapped=False)
    return said_by(partial(export_on, road, hf, over))


def test_an_export_into_a_folder_that_belongs_to_somebody_else(tmp_path, over, road):  # noqa: F811
    hf = prepare(tmp_path / "theirs" / "hf", over)
    hf.parent.chmod(0o500)
    try:
        said = in_fork(partial(without_permission, hf, over, road))
    finally:
        hf.parent.chmod(0o700)
    assert said.startswith("PermissionError") and "is not writable: change its" in said
    assert_unharmed(hf, over)


def through_link_to_other_disk(folder: Path, over: bool, road: str) -> str:  # noqa: F811
    in_namespace()
    hf = prepare(mount(folder, 1 << 20) / "hf", over)
    link = folder.with_name("link")
    link.symlink_to(hf)
    export_on(road, link, over)
    assert link.is_symlink()
    assert_exported(hf, over)
    return "done"


def test_an_export_through_a_link_to_another_file_system(tmp_path, over, road):  # noqa: F811
    assert in_fork(partial(through_link_to_other_disk, tmp_path / "disk", over, road)) == "done"


# --- several processes -------------------------------------------------------------------------------------------


def export_on_rank(hf: Path, over: bool, port: int, rank: int, dies: int | None, at: int) -> None:  # noqa: F811
    """Export on one of two ranks; rank `dies` kills itself before its change `at` to the file system."""
    work = partial(export, hf, over)
    on_rank(port, rank, partial(killed_at_change, at, hf, work) if rank == dies else work)


def on_ranks(hf: Path, over: bool, dies: int | None, at: int) -> list[dict]:  # noqa: F811
    store = meeting_place()
    works = [partial(export_on_rank, hf, over, store.port, rank, dies, at) for rank in (0, 1)]
    return [child.answer() for child in [Child(work) for work in works]]


@pytest.mark.parametrize(("dies", "at"), [(None, 0), (1, 0), (0, 4)])
def test_ranks_share_one_export_and_end_together(tmp_path, over, dies, at):  # noqa: F811
    hf = prepare(tmp_path / "out" / "hf", over)
    seen = on_ranks(hf, over, dies, at)
    if dies is None:
        assert [each.get("error") for each in seen] == [None, None], seen
    else:
        assert seen[dies]["error"] == "killed"
        assert "error" in seen[1 - dies] and "\n" not in seen[1 - dies]["message"], seen
        assert contents(hf) == (OLD if over else None)
        export(hf, over)
    assert_exported(hf, over)


@BY_TWO
@pytest.mark.parametrize("dies", [0, 1])
def test_a_kill_of_a_rank_at_each_change_ends_both(tmp_path, over, dies, record_property):  # noqa: F811
    for number in range(100):
        hf = prepare(tmp_path / str(number) / "hf", over)
        seen = on_ranks(hf, over, dies, number)
        if "error" not in seen[dies]:
            break
        there = contents(hf)
        assert seen[dies]["error"] == "killed", seen
        # All was done but what rank 0 does alone, or it has lost the other.
        other = seen[1 - dies]
        assert "\n" not in other["message"] if "error" in other else not dies and there == WHOLE[over], seen
        assert there in ((OLD if over else None), *([] if dies else [WHOLE[over]]))
        # A rank that lives removes what it has staged.
        assert not dies or names(hf.parent) == ({"hf"} if over else set())
        export(hf, overwrite_after(there))
        assert_exported(hf, over)
    assert seen == [{"result": None}] * 2 and number > (2 if dies else 8)
    assert_exported(hf, over)
    record_property("count of exports on two ranks of which one is killed, at each change in turn", number)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, each with its release."""
    folder = tmp_path_factory.mktemp("models")
    assert "error" not in run(partial(make_models, folder))
    return folder


def make_models(folder: Path) -> None:
    for name, layers in (("one", 1), ("two", 2)):
        save_hf_model(folder / f"hf-{name}", num_hidden_layers=layers)
        AutoBridge.import_ckpt(folder / f"hf-{name}", folder / name)


def export_model(folder: Path, name: str, hf: Path, road: str) -> str:
    def work() -> None:
        bridge = AutoBridge.from_hf_pretrained(folder / f"hf-{name}")
        bridge.export_ckpt(folder / name, hf, show_progress=False, overwrite=False)

    return said_by(partial(ROADS[road], work))


def test_two_exports_of_two_models_into_one_folder(models, tmp_path, road, record_property):
    """One is done, and the other says who was first; nothing of the other is in it."""
    hf = tmp_path / "out" / "hf"
    works = [partial(export_model, models, name, hf, road) for name in ("one", "two")]
    seen = [child.answer() for child in [Child(work) for work in works]]
    said = dict(zip(("one", "two"), (each["result"] for each in seen), strict=True))
    (done,) = (name for name, message in said.items() if not message)
    (refused,) = filter(None, said.values())
    assert refused.startswith("FileExistsError: ") and ("another process" in refused or "exists, expected" in refused)
    source = load_file(models / f"hf-{done}" / "model.safetensors")
    exported = load_file(hf / "model.safetensors")
    assert exported.keys() == source.keys() and all(exported[name].equal(source[name]) for name in source)
    assert names(hf.parent) == {"hf"}
    record_property("count of exports beside another one, refused", 1)


def export_in_one(folder: Path, hf: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(folder / "hf-two")
    bridge.export_ckpt(folder / "two", hf, show_progress=False, max_shard_size="100KB")


def test_an_export_in_two_processes(models, tmp_path, record_property):
    """Has the files that one process writes, byte for byte; or none, where one of the two is killed, or both end."""
    record_property("count of exports in two processes", 3)
    hf = tmp_path / "out" / "hf"
    arguments = ["export", models / "two", hf, "--max-shard-size=100KB"]
    for how in ("the second is killed", "the command gets SIGTERM"):
        run_and_end(arguments, tmp_path / how, how)
        assert not names(tmp_path / "out")
    code, said, error = run_in_two(arguments)
    assert code == 0 and said.count("Wrote") == 1 and not error, (said, error)
    assert "error" not in run(partial(export_in_one, models, tmp_path / "one-process"))
    assert len(contents(hf)) > 4 and contents(hf) == contents(tmp_path / "one-process")
