# SPDX-License-Identifier: Apache-2.0
"""Measure what each command takes for a tiny model, with and without caches of bytecode."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.flows import STREAMING


_COMMAND = STREAMING.command[0]
MEASURED = ("wall", "cpu", "resident")
IMPORT = "megatron-bridge import"
COMMANDS = {
    IMPORT: (_COMMAND, "import", "{model}", "{target}"),
    "megatron-bridge export": (_COMMAND, "export", "{checkpoint}", "{target}"),
    "megatron-bridge inspect": (_COMMAND, "inspect", "{checkpoint}"),
    "megatron-bridge --help": (_COMMAND, "--help"),
    "from megatron.bridge import AutoBridge": (sys.executable, "-c", "from megatron.bridge import AutoBridge"),
    "import torch": (sys.executable, "-c", "import torch"),
}


@dataclass(frozen=True)
class Start:
    """One run of one command.

    Attributes:
        command: A key of COMMANDS.
        caches: Whether Python reads caches of bytecode.
        wall: Seconds from start to end.
        cpu: Seconds of the processors, of user and kernel.
        resident: Largest resident set of its processes, in bytes.
    """

    command: str
    caches: bool
    wall: float
    cpu: float
    resident: int


def measure(model: Path, checkpoint: Path, folder: Path, rounds: int) -> list[Start]:
    """Run each command in turn, and each with caches once before that.

    Args:
        model: A tiny Hugging Face checkpoint.
        checkpoint: The release checkpoint of it.
        folder: A folder for targets and logs.
        rounds: Runs of each.
    """
    places = {"model": model, "checkpoint": checkpoint, "target": folder / "started"}
    for command in COMMANDS:
        _run(command, True, places, folder)
    return [
        _run(command, caches, places, folder)
        for _ in range(rounds)
        for caches in (True, False)
        for command in COMMANDS
    ]


def _run(command: str, caches: bool, places: dict[str, Path], folder: Path) -> Start:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONDONTW", "PYTHONPYC"))}
    if not caches:
        # Python looks for caches below a folder that has none.
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(folder / "no-caches")}
    shutil.rmtree(places["target"], ignore_errors=True)
    with (folder / "start-up.log").open("wb") as log:
        begin = time.monotonic()
        process = subprocess.Popen(
            [part.format(**places) for part in COMMANDS[command]], stdout=log, stderr=subprocess.STDOUT, env=env
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - begin
    shutil.rmtree(places["target"], ignore_errors=True)
    if code := os.waitstatus_to_exitcode(status):
        lines = (folder / "start-up.log").read_text(errors="replace").splitlines() or [""]
        raise RuntimeError(f"{command} ended with {code}: {lines[-1]}")
    return Start(command, caches, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def rows(starts: Sequence[Start]) -> Iterator[dict[str, str | bool | float]]:
    """Yield the medians of each command, with the ratios to those of an import."""
    for caches in (True, False):
        medians = {}
        for command in dict.fromkeys(each.command for each in starts):
            runs = [each for each in starts if (each.command, each.caches) == (command, caches)]
            if runs:
                medians[command] = {name: statistics.median(getattr(each, name) for each in runs) for name in MEASURED}
        for command, values in medians.items():
            ratios = {f"{name} / import": round(value / medians[IMPORT][name], 3) for name, value in values.items()}
            yield {"command": command, "caches": caches, **values, **ratios}


def show(starts: Sequence[Start], console: Console) -> None:
    """Print the rows as a table."""
    table = Table("start-up", "bytecode caches", "wall, s", "CPU, s", "peak, GB", "wall", "CPU", "peak")
    for row in rows(starts):
        values = (f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{row['resident'] / 10**9:.2f}")
        ratios = (f"{row[f'{name} / import']:.2f}" for name in MEASURED)
        table.add_row(str(row["command"]), "yes" if row["caches"] else "no", *values, *ratios)
    console.print(table, "Medians of whole commands on a tiny model. The last three columns are ratios to an import.")
