# SPDX-License-Identifier: Apache-2.0
"""Imports that can't be finished, or go through something unusual: an error in one line or a correct result."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from checkpoints import (
    PAYLOAD,
    TRACKER,
    AutoBridge,
    Child,
    digest,
    meeting_place,
    names,
    on_rank,
    on_two_ranks,
    run,
    save_hf_model,
)
from kills import killed_at_change

from megatron.bridge.training import release_writer
from megatron.bridge.utils.common_utils import get_rank_safe


WHOLE = {"release", TRACKER}
MS_RDONLY, MS_REMOUNT = 1, 32  # of sys/mount.h


def make_models(folder: Path) -> None:
    for name, layers in (("old", 1), ("new", 2)):
        save_hf_model(folder / f"hf-{name}", num_hidden_layers=layers)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, an older release of the first, and what an import of each is."""
    folder = tmp_path_factory.mktemp("models")
    assert "error" not in run(partial(make_models, folder))
    assert "error" not in run(partial(AutoBridge.import_ckpt, folder / "hf-new", folder / "new"))
    assert "error" not in run(partial(AutoBridge.import_ckpt, folder / "hf-old", folder / "old"))
    return folder


@pytest.fixture(params=[False, True], ids=["into nothing", "over a release"])
def over(request):
    return request.param


def import_on_two(source: Path, out: Path) -> None:
    on_two_ranks(partial(AutoBridge.import_ckpt, source, out))


ROADS = {
    "in memory": partial(AutoBridge.import_ckpt, streaming=False),
    "streaming": AutoBridge.import_ckpt,
    "two processes": import_on_two,
}


# `nox -s two_processes` runs these rows, and `nox -s unit` doesn't.
BY_TWO = pytest.mark.two_processes


def with_two(roads: Iterable[str]) -> list[Any]:
    """Return the rows of a test, of which a session of its own runs those of two processes."""
    return [pytest.param(road, marks=BY_TWO) if road == "two processes" else road for road in roads]


@pytest.fixture(params=with_two(ROADS))
def road(request):
    return request.param


def prepare(models: Path, out: Path, over: bool) -> Path:
    if over:
        shutil.copytree(models / "old", out)
    return out


def said_by(work: Callable[[], None]) -> str:
    """Call `work` in this process; returns its error, which must be one of a user and one line, or an empty string."""
    try:
        work()
    except (OSError, ValueError) as error:
        assert "\n" not in str(error), str(error)
        return f"{type(error).__name__}: {error}"
    return ""


def in_fork(work: Callable[[], str]) -> str:
    """Call `work` in a process of its own; returns what it returns, or skips the test if it is not allowed to."""
    seen = run(work)
    if seen.get("error") == "NotAllowed":
        # In CI they are a part of what is tested.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no user namespaces here: {seen['message']}")
    assert "error" not in seen, seen
    return seen["result"]


def assert_unharmed(models: Path, out: Path, over: bool) -> None:
    assert names(out) == (WHOLE if over else set())
    assert digest(out) == (digest(models / "old") if over else None)


def assert_imported(models: Path, out: Path) -> None:
    assert names(out) == WHOLE
    # A second rank has a file of its own.
    assert names(out / "release") - {"__1_0.distcp"} == PAYLOAD
    assert digest(out) == digest(models / "new")


# --- the file system ---------------------------------------------------------------------------------------------


class NotAllowed(Exception):
    """This process may make no namespaces."""


def in_namespace(*, mapped: bool = True) -> None:
    """Give this process, a fork, mounts of its own; without `mapped` no power over files that it may not write."""
    user, group = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
        if mapped:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise NotAllowed(str(error)) from None


def mount(folder: Path, kib: int, flags: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={kib}k".encode()):
        raise NotAllowed(os.strerror(ctypes.get_errno()))
    return folder


def used_kib(folder: Path) -> int:
    seen = os.statvfs(folder)
    return (seen.f_blocks - seen.f_bfree) * seen.f_frsize >> 10


def on_small_disk(models: Path, folder: Path, over: bool, free_kib: int, road: str) -> str:
    in_namespace()
    disk = mount(folder, 1 << 20)
    out = prepare(models, disk / "out", over)
    # tmpfs takes 0 for no limit at all.
    mount(disk, max(used_kib(disk) + free_kib, 4), MS_REMOUNT)
    work = partial(ROADS[road], models / "hf-new", out)
    said = said_by(work)
    assert_unharmed(models, out, over)
    mount(disk, 1 << 20, MS_REMOUNT)
    work()
    assert_imported(models, out)
    return said


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("free_kib", [0, 64, 500])
def test_a_full_disk(models, tmp_path, over, free_kib, road, record_property):
    said = in_fork(partial(on_small_disk, models, tmp_path / "disk", over, free_kib, road))
    # The disk is looked at before weights are written. What stands beside them takes room, too.
    assert any(each in said for each in ("No space left on device", "could not be written", "GB left, expected"))
    record_property("count of imports onto a full disk", 1)


def with_quota(models: Path, out: Path, over: bool, size: int, road: str) -> str:
    prepare(models, out, over)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    work = partial(ROADS[road], models / "hf-new", out)
    said = said_by(work)
    assert_unharmed(models, out, over)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    work()
    assert_imported(models, out)
    return said


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("size", [0, 20_000])
def test_a_file_that_may_grow_no_further(models, tmp_path, over, size, road, record_property):
    said = in_fork(partial(with_quota, models, tmp_path / "out", over, size, road))
    assert "File too large" in said or "could not be written" in said
    record_property("count of imports with a limit to the size of files", 1)


def on_read_only_disk(models: Path, folder: Path, over: bool, road: str) -> str:
    in_namespace()
    disk = mount(folder, 1 << 20)
    out = prepare(models, disk / "out", over)
    mount(disk, 1 << 20, MS_REMOUNT | MS_RDONLY)
    said = said_by(partial(ROADS[road], models / "hf-new", out))
    assert_unharmed(models, out, over)
    return said


def test_a_read_only_target(models, tmp_path, over, road, record_property):
    record_property("count of imports onto a read-only disk", 1)
    said = in_fork(partial(on_read_only_disk, models, tmp_path / "disk", over, road))
    assert "is not writable: change its" in said


def without_permission(models: Path, out: Path, road: str) -> str:
    in_namespace(mapped=False)
    return said_by(partial(ROADS[road], models / "hf-new", out))


def test_a_target_that_belongs_to_somebody_else(models, tmp_path, over, road, record_property):
    record_property("count of imports into a folder of somebody else", 1)
    out = prepare(models, tmp_path / "out", over)
    out.mkdir(exist_ok=True)
    out.chmod(0o500)
    try:
        said = in_fork(partial(without_permission, models, out, road))
    finally:
        out.chmod(0o700)
    assert said.startswith("PermissionError") and "is not writable: change its" in said
    assert_unharmed(models, out, over)


def through_link_to_other_disk(models: Path, folder: Path, over: bool, road: str) -> str:
    in_namespace()
    disk = mount(folder, 1 << 20)
    assert disk.stat().st_dev != models.stat().st_dev
    prepare(models, disk / "out", over)
    (disk / "out").mkdir(exist_ok=True)
    link = folder.with_name("link")
    link.symlink_to(disk / "out")
    ROADS[road](models / "hf-new", link)
    assert link.is_symlink()
    assert_imported(models, disk / "out")
    assert_imported(models, link)
    return "done"


def test_a_symlinked_target_on_another_file_system(models, tmp_path, over, road, record_property):
    record_property("count of imports through a link, onto another file system", 1)
    assert in_fork(partial(through_link_to_other_disk, models, tmp_path / "disk", over, road)) == "done"


# --- what changes meanwhile --------------------------------------------------------------------------------------


def while_written(act: Callable[[Path], None], models: Path, out: Path, road: str) -> str:
    """Import, and call `act` with the source when the import is planned and before anything is published."""
    source = Path(shutil.copytree(models / "hf-new", out.with_name("hf")))
    stage = release_writer.ReleaseWriter.stage

    def staged(writer: release_writer.ReleaseWriter) -> str:
        payload = stage(writer)
        if get_rank_safe() == 0:
            act(source)
        if dist.is_initialized():
            dist.barrier()
        return payload

    release_writer.ReleaseWriter.stage = staged
    return said_by(partial(ROADS[road], source, out))


def save_iteration(out: Path, source: Path) -> None:
    """Save as a training does."""
    (out / "iter_0000002").mkdir()
    (out / TRACKER).write_text("2")


def test_a_training_that_saves_meanwhile(models, tmp_path, over, road):
    out = prepare(models, tmp_path / "out", over)
    said = in_fork(partial(while_written, partial(save_iteration, out), models, out, road))
    assert said.startswith("FileExistsError") and "holds training iteration 2" in said
    assert names(out) == {"iter_0000002", TRACKER} | ({"release"} if over else set())
    assert (out / TRACKER).read_text() == "2"


def cut_short(source: Path) -> None:
    (file,) = source.glob("*.safetensors")
    os.truncate(file, file.stat().st_size * 2 // 3)


@pytest.mark.parametrize("road", with_two(["streaming", "two processes"]))
def test_a_source_that_is_cut_short_meanwhile(models, tmp_path, over, road):
    out = prepare(models, tmp_path / "out", over)
    said = in_fork(partial(while_written, cut_short, models, out, road))
    assert said.startswith("ValueError") and "download it again" in said
    assert_unharmed(models, out, over)


# --- several processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importing", "rounds"), [(AutoBridge.import_ckpt, 10), pytest.param(import_on_two, 4, marks=BY_TWO)]
)
def test_two_imports_into_one_target(models, tmp_path, importing, rounds, record_property):
    """Several times, two at once: one at least is done, and the other one is done or says who was first."""
    refused = 0
    for number in range(rounds):
        out = tmp_path / str(number)
        works = [partial(said_by, partial(importing, models / f"hf-{name}", out)) for name in ("old", "new")]
        seen = [child.answer() for child in [Child(work) for work in works]]
        said = [each["result"] for each in seen if "error" not in each]
        assert len(said) == 2 and "" in said, seen
        for message in filter(None, said):
            assert message.startswith("FileExistsError: another process is writing to"), message
            refused += 1
        assert names(out) == WHOLE
        assert digest(out) in (digest(models / "old"), digest(models / "new"))
    record_property("count of imports beside another one, done", 2 * rounds - refused)
    record_property("count of imports beside another one, refused", refused)


def import_on_rank(source: Path, out: Path, port: int, rank: int, dies: int | None, at: int) -> None:
    """Import on one of two ranks; rank `dies` kills itself before its change `at` to the file system."""
    work = partial(AutoBridge.import_ckpt, source, out)
    on_rank(port, rank, partial(killed_at_change, at, out, work) if rank == dies else work)


def two_ranks(models: Path, out: Path, dies: int | None, at: int) -> tuple[list[dict], float]:
    """Import on two ranks; returns what each said, and the seconds from the death of one to the end of the other."""
    source, store = models / "hf-new", meeting_place()
    children = [Child(partial(import_on_rank, source, out, store.port, rank, dies, at)) for rank in (0, 1)]
    start = time.monotonic()
    if dies is not None:
        children[dies].process.join()
        start = time.monotonic()
    seen = [child.answer() for child in children]
    return seen, time.monotonic() - start


def test_two_ranks(models, tmp_path, over):
    out = prepare(models, tmp_path / "out", over)
    seen, _ = two_ranks(models, out, None, 0)
    assert [each.get("error") for each in seen] == [None, None], seen
    assert names(out) == WHOLE


@pytest.mark.parametrize(("dies", "at"), [(1, 0), (0, 0), (0, 4), (0, 9)])
def test_a_rank_that_dies(models, tmp_path, over, dies, at, record_property):
    record_property("count of imports on two ranks of which one dies", 1)
    out = prepare(models, tmp_path / "out", over)
    seen, seconds = two_ranks(models, out, dies, at)
    assert seconds < 60
    assert seen[dies]["error"] == "killed"
    survivor = seen[1 - dies]
    assert "error" in survivor and "\n" not in survivor["message"], survivor
    assert digest(out) == (digest(models / "old") if over else None)
    if dies == 1:
        assert_unharmed(models, out, over)
    assert "error" not in run(partial(AutoBridge.import_ckpt, models / "hf-new", out))
    assert_imported(models, out)


def run_in_two(arguments: list[str | Path]) -> tuple[int, str, str]:
    """Run the command in two processes. Return its exit code, and what it writes to stdout and stderr."""
    return answer(start_in_two(arguments))


def start_in_two(arguments: list[str | Path], **variables: str) -> subprocess.Popen:
    command = [Path(sys.executable).with_name("megatron-bridge"), *arguments, "--processes=2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background ignores interrupts. A terminal's interrupt reaches a group of processes.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
        env=os.environ | variables,
    )


def answer(process: subprocess.Popen) -> tuple[int, str, str]:
    said, error = process.communicate(timeout=300)
    assert wait_until(lambda: not alive_in_session(process.pid), 60), "a process outlives the command"
    return process.returncode, said, error


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def alive_in_session(leader: int) -> list[int]:
    return [each.pid for each in psutil.process_iter() if is_alive_in(leader, each)]


def is_alive_in(leader: int, process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def death_of(killed: int) -> tuple[int, str, str]:
    end = "ended with SIGKILL before it was done. It may have run out of memory. Run the command again."
    return 1, "", f"Error: process {killed + 1} of 2 {end}\n"


ABORTED = (1, "", "\nAborted!\n")
# What a signal is sent to, of the command's process and its two; the signal, and what the command says.
ENDS = {
    "the first is killed": (1, signal.SIGKILL, death_of(0)),
    "the second is killed": (2, signal.SIGKILL, death_of(1)),
    "the command gets SIGTERM": (0, signal.SIGTERM, ABORTED),
    "the terminal interrupts all": (None, signal.SIGINT, ABORTED),
}


def run_and_end(arguments: list[str | Path], held: Path, how: str) -> None:
    """Run the command in two processes, and end it as `ENDS` says while both begin to write weights.

    Args:
        arguments: The subcommand and its arguments.
        held: A folder that there is not yet.
        how: The key in `ENDS`.
    """
    target, number, said = ENDS[how]
    held.mkdir()
    path = os.pathsep.join([str(Path(__file__).with_name("held")), os.environ["PYTHONPATH"]])
    process = start_in_two(arguments, PYTHONPATH=path, HELD=str(held))
    assert wait_until(lambda: {"0", "1"} <= names(held) or process.poll() is not None, 300)
    assert process.poll() is None, process.communicate()
    assert wait_until(lambda: all((held / rank).read_text() for rank in "01"), 30)
    started = [process.pid, *(int((held / rank).read_text()) for rank in "01")]
    os.killpg(process.pid, number) if target is None else os.kill(started[target], number)
    # Those that are interrupted go on by themselves. If they went on before that, they might be done too soon.
    assert target in (1, 2) or wait_until(lambda: {"0 goes on", "1 goes on"} <= names(held), 60)
    (held / "go").touch()
    assert answer(process) == said


def test_an_import_in_two_processes(models, tmp_path, record_property):
    record_property("count of imports in two processes", 1)
    out = prepare(models, tmp_path / "out", over=True)
    seen = run_in_two(["import", models / "hf-new", out, "--overwrite"])
    assert seen[0] == 0 and seen[1].count("Wrote") == 1 and not seen[2], seen
    assert {"__0_0.distcp", "__1_0.distcp"} <= names(out / "release")
    assert digest(out) == digest(models / "new")


@pytest.mark.parametrize("how", ENDS)
def test_an_import_in_two_processes_that_is_ended(models, tmp_path, how, record_property):
    record_property("count of imports in two processes that are ended", 1)
    out = prepare(models, tmp_path / "out", over=True)
    run_and_end(["import", models / "hf-new", out, "--overwrite"], tmp_path / "held", how)
    assert digest(out) == digest(models / "old")
    # The first owns the staging folder.
    if how != "the first is killed":
        assert_unharmed(models, out, over=True)
    else:
        assert "error" not in run(partial(AutoBridge.import_ckpt, models / "hf-new", out))
        assert_imported(models, out)
