# SPDX-License-Identifier: Apache-2.0
"""Processes of one host share a work, and end together: a rank that dies, and a caller that dies."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


SCRIPT = """\
import os, signal, sys, time
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron.bridge.host import processes


def share(case, folder):
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    staged = Path(folder, f"staged-{rank}")
    try:
        if "start" in case:
            # There is no third rank, so none gets further, however late the interrupt comes.
            os.environ["WORLD_SIZE"] = "3"
        # It waits for the other ranks, and lets no handler run.
        dist.init_process_group("gloo")
        staged.touch()
        dist.barrier()
        if rank == 1 and "one is killed" in case:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and case == "an error of one" or case == "an error of all":
            raise OSError(f"{case} is enough")
        if "busy" in case or "caller" in case:
            Path(folder, f"busy-{rank}").touch()
            time.sleep(600)
        dist.barrier()
    except BaseException as error:
        if processes.has_to_say(error):
            print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if case == "the caller is interrupted":
            # Of the terminal, and then of the caller.
            signal.raise_signal(signal.SIGTERM)
        dist.destroy_process_group()
        staged.unlink(missing_ok=True)


def start_interrupted(process, start=BaseProcess.start):
    start(process)
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    if "start" in sys.argv[1]:
        BaseProcess.start = start_interrupted
    # A job in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "interrupted" in sys.argv[1]:
        # There is nothing to explain.
        processes._SECONDS_TO_EXPLAIN = 600
    try:
        processes.run(share, tuple(sys.argv[1:]), 2, preload="torch.distributed")
    except ChildProcessError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1)
"""

KILLED = "Error: process 2 of 2 ended with SIGKILL before it was done. It may have run out of memory. Run the command"
# What is said, the files that are there at the end, and the signal that the caller gets.
CASES = {
    "an error of one": ("Error: an error of one is enough", set(), None),
    "an error of all": ("Error: an error of all is enough", set(), None),
    # A killed process removes nothing.
    "one is killed while the other is busy": (KILLED, {"staged-1", "busy-0"}, None),
    "the caller is killed": ("", {"busy-0", "busy-1"}, signal.SIGKILL),
    "the caller is interrupted": ("KeyboardInterrupt", {"busy-0", "busy-1"}, signal.SIGINT),
    "the start is interrupted": ("KeyboardInterrupt", set(), signal.SIGINT),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """All cases at once, since each waits most of its time."""
    script = tmp_path_factory.mktemp("script") / "share.py"
    script.write_text(SCRIPT)
    found = {}
    for number, case in enumerate(CASES):
        folder = tmp_path_factory.mktemp(f"case-{number}")
        command = [sys.executable, str(script), case, str(folder)]
        # In a session of its own, since a terminal's interrupt reaches all processes and this one is for the caller.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found[case] = folder, subprocess.Popen(command, start_new_session=True, **pipes)
    yield found
    for _, process in found.values():
        process.kill()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_processes_share_a_work_and_end_together(running, case):
    said, left, sent = CASES[case]
    folder, process = running[case]
    if sent is not None and "caller" in case:
        wait_for(lambda: {"busy-0", "busy-1"} <= names(folder))
        process.send_signal(sent)
    out, err = process.communicate(timeout=300)
    wait_for(lambda: names(folder) == left)
    assert process.returncode == (-sent if sent else 1), err
    lines = err.splitlines()
    assert out == "" and (lines[-1] if lines else "").startswith(said)
    # Python prints the traceback of the interrupt in the script; the command doesn't.
    assert len(lines) <= 1 or sent == signal.SIGINT, err
    wait_for(lambda: not alive_in_session_of(process.pid))


def alive_in_session_of(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("ranks", "group", "first"),
    [
        ({}, False, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, True),  # of a training's pod, and not started by torchrun
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, False, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, True, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, True, False),
    ],
)
def test_the_environment_tells_a_rank(monkeypatch, ranks, group, first):
    from megatron.bridge.host import processes

    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert (processes.in_group(), processes.is_first()) == (group, first)
