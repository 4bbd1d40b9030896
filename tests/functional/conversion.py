# SPDX-License-Identifier: Apache-2.0
"""Rows that measure import and export beside `cp -r`, and run `megatron-bridge verify`.

benchmarks/ writes the models. Its session compares the import with upstream's, in several rounds. Here each command
runs once, because the host may be available for minutes only.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import matrix
import steps
from reference import Tensors


sys.path.append(str(steps.HERE.parents[1]))

GB = 10**9
SMALL = "small"
SIZES = {SMALL: 40, "1b": 60, "3b": 100, "8b": 150}  # typical seconds, on a disk with half a gigabyte per second
MARGIN_GB = 2.0
EXPORT_MEMORY = 1.8  # bytes that the export needs for each byte of the model
TIMES_DISK = 3  # the model, the release checkpoint, and the export or copy


def shape(size: str):
    """Return the shape of Llama 3 in a size of `SIZES`."""
    from benchmarks.__main__ import SMALL as changes
    from benchmarks.shapes import llama

    return llama("1b", **changes) if size == SMALL else llama(size)


@dataclass(frozen=True, kw_only=True)
class Conversion(matrix.Check):
    """A row that measures time and peak memory of import and export for a model of Llama 3's shape.

    Attributes:
        size: A key of `SIZES`.
        limit_s: The most seconds that it may take.
    """

    size: str
    limit_s: float = 600

    @property
    def typical_s(self) -> float:
        """Seconds that it takes, until it has been measured here."""
        return SIZES[self.size]

    @classmethod
    def of(cls, size: str) -> "Conversion":
        """Return the row of a size."""
        return cls(name=f"convert-{size}", model=f"Llama 3's shape, {size}", size=size)

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Return why it can't run here, or None if it can."""
        try:
            import psutil
        except ImportError as error:
            return f"needs psutil to measure: {error}"
        whole = shape(self.size).bytes / GB
        runner.folder.mkdir(parents=True, exist_ok=True)
        found = {
            "disk": (shutil.disk_usage(runner.folder).free / GB, TIMES_DISK * whole + MARGIN_GB),
            "memory": (psutil.virtual_memory().available / GB, EXPORT_MEMORY * whole + MARGIN_GB),
        }
        short = [
            f"needs {needed:.0f} GB of {what}, and {free:.0f} GB are free"
            for what, (free, needed) in found.items()
            if free < needed
        ]
        return short[0] if short else None

    def run(self, runner: matrix.Runner) -> "ConversionRun":
        """Return the run of this row."""
        return ConversionRun(runner, self)


class ConversionRun(matrix.Run):
    """One run of a conversion."""

    row: Conversion

    def go(self) -> None:
        """Run every stage, and always remove the models, because they may fill the disk."""
        try:
            super().go()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def go_on(self) -> None:
        """Write the model, copy it, import it, export it, and compare."""
        from tokenizer import train_tokenizer

        from benchmarks.weights import write_checkpoint

        source, copy, megatron, back = (self.root / name for name in ("hf", "copy", "megatron", "back"))
        with self.stage("write the model"):
            model = shape(self.row.size)
            write_checkpoint(source, model)
            train_tokenizer(source)
            self.figures["model, GB"] = model.bytes / GB
        with self.stage("cp -r"):
            self.measure("cp -r", ["cp", "-r", str(source), str(copy)])
            shutil.rmtree(copy)
        with self.stage("import"):
            self.measure("import", [*bridge(), "import", str(source), str(megatron)])
        with self.stage("export"):
            self.measure("export", [*bridge(), "export", str(megatron), str(back), "--hf-model", str(source)])
        with self.stage("compare"):
            expected, found = Tensors(source), Tensors(back)
            matrix.expect(sorted(found), sorted(expected), "names of the exported tensors")
            wrong = [name for name in expected if not expected[name].equal(found[name])]
            matrix.expect(wrong, [], "tensors that the export changed")

    def measure(self, name: str, command: list[str]) -> None:
        """Run a command with the model not in the page cache, and record its seconds and its peak memory."""
        from benchmarks import cache, memory

        os.sync()
        cache.drop(self.root)
        log = self.logs / f"{name.replace(' ', '')}.txt"
        run = memory.run(command, log, env=steps.environment())
        self.figures[f"{name}, s"] = run.wall
        if name != "cp -r":
            self.figures[f"{name}, peak GB"] = run.peak("resident") / GB


def bridge() -> list[str]:
    """Return the command `megatron-bridge` of this Python, wherever its scripts are."""
    return [sys.executable, "-c", "from megatron.bridge.cli import main; main(prog_name='megatron-bridge')"]


@dataclass(frozen=True, kw_only=True)
class Verify(matrix.Check):
    """A row that runs `megatron-bridge verify` on this host's device, if the wheel has that command."""

    typical_s = 30

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Return why the command is missing, or None if it is there."""
        question = [*bridge(), "verify", "--help"]
        asked = subprocess.run(question, capture_output=True, text=True, env=steps.environment())
        if asked.returncode == 0:
            return None
        return f"megatron-bridge verify: {(asked.stderr.strip().splitlines() or ['no output'])[-1]}"

    def run(self, runner: matrix.Runner) -> "VerifyRun":
        """Return the run of this row."""
        return VerifyRun(runner, self)


class VerifyRun(matrix.Run):
    """One run of `megatron-bridge verify`."""

    def go_on(self) -> None:
        """Import the tiny model, and verify the release checkpoint against it."""
        row = matrix.Row(self.row.model, matrix.ONE)
        with self.stage("import"):
            release = self.runner.imported(row)
        with self.stage("verify"):
            command = [*bridge(), "verify", str(release), "--hf-model", str(self.runner.source(row))]
            steps.Step("verify", command, self.logs / "log.txt").run(limit_s=self.row.limit_s)
