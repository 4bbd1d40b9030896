# SPDX-License-Identifier: Apache-2.0
"""Runs a command, and samples the memory of its process tree while it runs."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil


INTERVAL = 0.1
"""Seconds between two samples."""

REST = 10
"""A sample is followed by that many times its length without one. The kernel walks the page tables for it, which takes
long for a large process and keeps it from changing its mappings meanwhile."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process tree at one moment, in bytes.

    Attributes:
        anonymous: Pages that belong to no file: what the processes allocated. The host can't do without them.
        file: Pages of files that are mapped: libraries, and checkpoints that are read so. The kernel takes them back
            when it needs memory.
    """

    anonymous: int
    file: int

    @property
    def resident(self) -> int:
        """The resident set size: both."""
        return self.anonymous + self.file


@dataclass(frozen=True)
class Run:
    """What a command did.

    Attributes:
        wall: Seconds from its start to its end.
        started: Seconds until the marker was there, None if it never was.
        samples: Memory over time, each with the seconds since the start.
        high_water: The largest resident set that a process of the tree had, as the kernel counts it, in bytes.
    """

    wall: float
    started: float | None
    samples: list[tuple[float, Memory]]
    high_water: int

    def peak(self, kind: str) -> int:
        """Return the peak of `anonymous`, `file` or `resident`, in bytes.

        Of `resident` it is the kernel's where that is higher: a sample misses what comes and goes between two.
        """
        sampled = max((getattr(memory, kind) for _, memory in self.samples), default=0)
        return max(sampled, self.high_water) if kind == "resident" else sampled


def read_kilobytes(text: str, *names: str) -> list[int]:
    """Read values of a file like `/proc/PID/smaps_rollup` or `/proc/PID/status`.

    Args:
        text: What the file says.
        *names: Names of lines.

    Returns:
        The values in bytes.

    Raises:
        ValueError: A line is missing.
    """
    lines = dict(line.split(":", 1) for line in text.splitlines() if line.endswith(" kB"))
    missing = [name for name in names if name not in lines]
    if missing:
        raise ValueError(f"found no {missing[0]} among {sorted(lines)}: Linux from 4.14 on has it, use that")
    return [int(lines[name].split()[0]) * 1024 for name in names]


def run(command: list[str], log: Path, marker: Path | None = None, env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end.

    Args:
        command: The command.
        log: Where its output goes.
        marker: A file or folder, the appearance of which is noted.
        env: The environment, None for this process's own.

    Raises:
        RuntimeError: The command failed.
    """
    samples: list[tuple[float, Memory]] = []
    started = None
    due, high_water = 0.0, 0
    with log.open("wb") as output:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                now = time.monotonic() - begin
                if started is None and marker is not None and marker.exists():
                    started = now
                if now >= due:
                    memory, high = _sample(process.pid)
                    samples.append((now, memory))
                    high_water = max(high_water, high)
                    due = now + max(INTERVAL, REST * (time.monotonic() - begin - now))
                time.sleep(INTERVAL / 5)
            wall = time.monotonic() - begin
        finally:
            process.kill()
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {(lines or [''])[-1]} (see {log})")
    return Run(wall, started, samples, high_water)


def _sample(pid: int) -> tuple[Memory, int]:
    """The memory of a process and all its descendants, and the highest that one of them had."""
    total, high_water = Memory(0, 0), 0
    for each in _tree(pid):
        try:
            resident, anonymous = read_kilobytes(Path(f"/proc/{each}/smaps_rollup").read_text(), "Rss", "Anonymous")
            (high,) = read_kilobytes(Path(f"/proc/{each}/status").read_text(), "VmHWM")
        except ProcessLookupError:
            continue  # it is about to end, and has given its memory back
        except (OSError, ValueError):
            if psutil.pid_exists(each) and psutil.Process(each).status() != psutil.STATUS_ZOMBIE:
                raise
            continue  # it has ended meanwhile
        total = Memory(total.anonymous + anonymous, total.file + resident - anonymous)
        high_water = max(high_water, high)
    return total, high_water


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
