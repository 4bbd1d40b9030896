# SPDX-License-Identifier: Apache-2.0
"""Run a command, and sample the memory of its process tree meanwhile."""

import glob
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil


INTERVAL = 0.1
"""Seconds between two samples."""

REST = 10
"""The pause after a sample, as a multiple of the sample's duration. The kernel walks the page tables for a sample.
That takes long for a large process, which can't change its mappings meanwhile."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process tree at one moment, in bytes.

    Attributes:
        anonymous: Pages without a file, which the processes allocated. The kernel can't reclaim them.
        file: Pages of mapped files: libraries, and checkpoints that are read by mapping. The kernel reclaims them when
            it needs memory.
    """

    anonymous: int
    file: int

    @property
    def resident(self) -> int:
        """The resident set size, which is the sum of both."""
        return self.anonymous + self.file


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        wall: Seconds from its start to its end.
        started: Seconds until the marker appeared, None if it never did.
        samples: Memory over time, each with the seconds since the start.
        high_water: The largest resident set of a process of the tree, in bytes, as counted by the kernel.
    """

    wall: float
    started: float | None
    samples: list[tuple[float, Memory]]
    high_water: int

    def peak(self, kind: str) -> int:
        """Return the peak of `anonymous`, `file`, or `resident`, in bytes.

        For `resident`, this is the kernel's figure if it is higher, because samples miss short peaks.
        """
        sampled = max((getattr(memory, kind) for _, memory in self.samples), default=0)
        return max(sampled, self.high_water) if kind == "resident" else sampled


def read_kilobytes(text: str, *names: str) -> list[int]:
    """Read values from a file such as `/proc/PID/smaps_rollup` or `/proc/PID/status`.

    Args:
        text: The content of the file.
        *names: The names of lines.

    Returns:
        The values in bytes.

    Raises:
        ValueError: A line is missing.
    """
    lines = dict(line.split(":", 1) for line in text.splitlines() if line.endswith(" kB"))
    missing = [name for name in names if name not in lines]
    if missing:
        raise ValueError(f"found {sorted(lines)}, expected {missing[0]} among them: use Linux 4.14 or later")
    return [int(lines[name].split()[0]) * 1024 for name in names]


def run(command: list[str], log: Path, marker: Path | None = None, env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end.

    Args:
        command: The command.
        log: The file for its output.
        marker: A file or folder, or a pattern of `glob`. The run records when it appears.
        env: The environment. Default: that of this process.

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
                if started is None and marker is not None and glob.glob(str(marker), recursive=True):
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
    """Return the memory of a process and its descendants, and the highest that one of them had."""
    total, high_water = Memory(0, 0), 0
    for each in _tree(pid):
        try:
            resident, anonymous = read_kilobytes(Path(f"/proc/{each}/smaps_rollup").read_text(), "Rss", "Anonymous")
            (high,) = read_kilobytes(Path(f"/proc/{each}/status").read_text(), "VmHWM")
        except ProcessLookupError:
            continue  # it is about to end, and has freed its memory
        except (OSError, ValueError):
            if psutil.pid_exists(each) and psutil.Process(each).status() != psutil.STATUS_ZOMBIE:
                raise
            continue  # it has ended
        total = Memory(total.anonymous + anonymous, total.file + resident - anonymous)
        high_water = max(high_water, high)
    return total, high_water


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
