# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with an import, for an export: kills, full disks, other users, two at once, ranks that die.

The folder that is exported to is what counts, so most of these exports write a few small files and no model.
"""

import os
import resource
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from checkpoints import AutoBridge, Child, names, run, run_forked, save_hf_model
from kills import at_each_change, killed_at_change
from safetensors.torch import load_file
from test_faults import (
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@exports_whole
def export_ckpt(bridge, megatron_path, hf_path):
    write(Path(hf_path), NEW)
    bridge.then()


def export(hf: Path, over: bool, then=lambda: None) -> None:  # noqa: F811
    pretrained = SimpleNamespace(model_name_or_path=None)
    export_ckpt(SimpleNamespace(hf_pretrained=pretrained, then=then), hf.parent / "checkpoint", hf, overwrite=over)


def prepare(hf: Path, over: bool) -> Path:  # noqa: F811
    write(hf, OLD) if over else hf.parent.mkdir(parents=True, exist_ok=True)
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


def on_small_disk(folder: Path, over: bool, free_kib: int) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    hf = prepare(disk / "hf", over)
    mount(disk, max(used_kib(disk) + free_kib, 4), MS_REMOUNT)
    said = said_by(partial(export, hf, over))
    assert_unharmed(hf, over)
    mount(disk, 1 << 20, MS_REMOUNT)
    export(hf, over)
    assert_exported(hf, over)
    return said


@pytest.mark.parametrize("free_kib", [0, 8, 64])
def test_an_export_onto_a_full_disk(tmp_path, over, free_kib, record_property):  # noqa: F811
    said = in_fork(partial(on_small_disk, tmp_path / "disk", over, free_kib))
    assert "No space left on device" in said or "GB left, expected" in said
    record_property("count of exports onto a full disk", 1)


def with_quota(hf: Path, over: bool) -> str:  # noqa: F811
    prepare(hf, over)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = said_by(partial(export, hf, over))
    assert_unharmed(hf, over)
    return said


def test_an_export_whose_files_may_grow_no_further(tmp_path, over):  # noqa: F811
    assert "File too large" in in_fork(partial(with_quota, tmp_path / "out" / "hf", over))


def on_read_only_disk(folder: Path, over: bool) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    hf = prepare(disk / "hf", over)
    mount(disk, 1 << 20, MS_REMOUNT | MS_RDONLY)
    said = said_by(partial(export, hf, over))
    assert_unharmed(hf, over)
    return said


def test_an_export_onto_a_read_only_disk(tmp_path, over):  # noqa: F811
    assert "is not writable: change its" in in_fork(partial(on_read_only_disk, tmp_path / "disk", over))


def onto_mount(folder: Path) -> str:
    in_namespace()
    return said_by(partial(export, mount(folder, 1 << 20), None))


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path):
    said = in_fork(partial(onto_mount, tmp_path / "disk"))
    assert f"is a mount point, which an export can't replace: pass a folder in it, {tmp_path}/disk/hf" in said


def without_permission(hf: Path, over: bool) -> str:  # noqa: F811
    in_namespace(mapped=False)
    return said_by(partial(export, hf, over))


def test_an_export_into_a_folder_that_belongs_to_somebody_else(tmp_path, over):  # noqa: F811
    hf = prepare(tmp_path / "theirs" / "hf", over)
    hf.parent.chmod(0o500)
    try:
        said = in_fork(partial(without_permission, hf, over))
    finally:
        hf.parent.chmod(0o700)
    assert said.startswith("PermissionError") and "is not writable: change its" in said
    assert_unharmed(hf, over)


def through_link_to_other_disk(folder: Path, over: bool) -> str:  # noqa: F811
    in_namespace()
    hf = prepare(mount(folder, 1 << 20) / "hf", over)
    link = folder.with_name("link")
    link.symlink_to(hf)
    export(link, over)
    assert link.is_symlink()
    assert_exported(hf, over)
    return "done"


def test_an_export_through_a_link_to_another_file_system(tmp_path, over):  # noqa: F811
    assert in_fork(partial(through_link_to_other_disk, tmp_path / "disk", over)) == "done"


# --- several processes -------------------------------------------------------------------------------------------


def export_on_rank(hf: Path, over: bool, rank: int, dies: int | None, at: int) -> None:  # noqa: F811
    """Export on one of two ranks; rank `dies` kills itself before its change `at` to the file system."""
    dist.init_process_group("gloo", init_method=f"file://{hf.parents[1]}/store", rank=rank, world_size=2)
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    if rank == dies:
        left = iter(range(at))
        at_each_change(hf, lambda: next(left, None) is None and kill())
    export(hf, over)


@pytest.mark.parametrize(("dies", "at"), [(None, 0), (1, 0), (0, 4)])
def test_ranks_share_one_export_and_end_together(tmp_path, over, dies, at):  # noqa: F811
    hf = prepare(tmp_path / "out" / "hf", over)
    children = [Child(partial(export_on_rank, hf, over, rank, dies, at)) for rank in (0, 1)]
    seen = [child.answer() for child in children]
    if dies is None:
        assert [each.get("error") for each in seen] == [None, None], seen
    else:
        assert seen[dies]["error"] == "killed"
        assert "error" in seen[1 - dies] and "\n" not in seen[1 - dies]["message"], seen
        assert contents(hf) == (OLD if over else None)
        export(hf, over)
    assert_exported(hf, over)


def make_models(folder: Path) -> None:
    for name, layers in (("one", 1), ("two", 2)):
        save_hf_model(folder / f"hf-{name}", num_hidden_layers=layers)
        AutoBridge.import_ckpt(folder / f"hf-{name}", folder / name)


def export_model(folder: Path, name: str, hf: Path) -> str:
    bridge = AutoBridge.from_hf_pretrained(folder / f"hf-{name}")
    return said_by(partial(bridge.export_ckpt, folder / name, hf, show_progress=False, overwrite=False))


def test_two_exports_of_two_models_into_one_folder(tmp_path, record_property):
    """One is done, and the other says who was first; nothing of the other is in it."""
    assert "error" not in run(partial(make_models, tmp_path))
    hf = tmp_path / "out" / "hf"
    seen = [child.answer() for child in [Child(partial(export_model, tmp_path, name, hf)) for name in ("one", "two")]]
    said = dict(zip(("one", "two"), (each["result"] for each in seen), strict=True))
    (done,) = (name for name, message in said.items() if not message)
    (refused,) = filter(None, said.values())
    assert refused.startswith("FileExistsError: ") and ("another process" in refused or "exists, expected" in refused)
    source = load_file(tmp_path / f"hf-{done}" / "model.safetensors")
    exported = load_file(hf / "model.safetensors")
    assert exported.keys() == source.keys() and all(exported[name].equal(source[name]) for name in source)
    assert names(hf.parent) == {"hf"}
    record_property("count of exports beside another one, refused", 1)


def export_in_one(folder: Path, hf: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(folder / "hf-two")
    bridge.export_ckpt(folder / "two", hf, show_progress=False, max_shard_size="100KB")


def test_an_export_in_two_processes(tmp_path, record_property):
    """Has the files that one process writes, byte for byte; or none, where one of the two is killed, or both end."""
    record_property("count of exports in two processes", 3)
    assert "error" not in run(partial(make_models, tmp_path))
    hf = tmp_path / "out" / "hf"
    arguments = ["export", tmp_path / "two", hf, "--max-shard-size=100KB"]
    for how in ("the second is killed", "the command gets SIGTERM"):
        run_and_end(arguments, tmp_path / how, how)
        assert not names(tmp_path / "out")
    code, said, error = run_in_two(arguments)
    assert code == 0 and said.count("Wrote") == 1 and not error, (said, error)
    assert "error" not in run(partial(export_in_one, tmp_path, tmp_path / "one-process"))
    assert len(contents(hf)) > 4 and contents(hf) == contents(tmp_path / "one-process")
