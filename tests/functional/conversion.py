# SPDX-License-Identifier: Apache-2.0
"""What a host does with a whole model: import and export beside `cp -r`, and the commands of `megatron-bridge`.

The checkpoints are those of benchmarks/, whose session compares the import with upstream's, in rounds. Here each
command runs once, for there may be a host for minutes only.
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
SIZES = {SMALL: 40, "1b": 60, "3b": 100, "8b": 150}  # and seconds, if the disk moves half a gigabyte in one
MARGIN_GB = 2.0
EXPORT_MEMORY = 1.8  # bytes that the export needs for each byte of the model
TIMES_DISK = 3  # the model, the release, and what is exported or copied


def shape(size: str):
    """Give the shape of Llama 3 in a size of `SIZES`."""
    from benchmarks.__main__ import SMALL as changes
    from benchmarks.shapes import llama

    return llama("1b", **changes) if size == SMALL else llama(size)


@dataclass(frozen=True, kw_only=True)
class Conversion(matrix.Check):
    """Import and export of a model of Llama 3's shape, with times and peaks of memory, beside `cp -r`.

    Attributes:
        size: Of `SIZES`.
        limit_s: Seconds that it may take.
    """

    size: str
    limit_s: float = 600

    @property
    def typical_s(self) -> float:
        """Seconds that it takes, as far as nobody has measured it here."""
        return SIZES[self.size]

    @classmethod
    def of(cls, size: str) -> "Conversion":
        """Make the row of a size."""
        return cls(name=f"convert-{size}", model=f"Llama 3's shape, {size}", size=size)

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Say why it can't run here, or give None if it can."""
        try:
            import psutil
        except ImportError as error:
            return f"measures with psutil: {error}"
        whole = shape(self.size).bytes / GB
        runner.folder.mkdir(parents=True, exist_ok=True)
        found = {
            "disk": (shutil.disk_usage(runner.folder).free / GB, TIMES_DISK * whole + MARGIN_GB),
            "memory": (psutil.virtual_memory().available / GB, EXPORT_MEMORY * whole + MARGIN_GB),
        }
        short = [
            f"needs {needed:.0f} GB of {what}, {free:.0f} GB are free"
            for what, (free, needed) in found.items()
            if free < needed
        ]
        return short[0] if short else None

    def run(self, runner: matrix.Runner) -> "ConversionRun":
        """Give what runs it."""
        return ConversionRun(runner, self)


class ConversionRun(matrix.Run):
    """A model on its way there and back."""

    row: Conversion

    def go(self) -> None:
        """Go through every stage, and leave no model behind: it may be most of what the disk holds."""
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
            matrix.expect(wrong, [], "tensors that came back otherwise")

    def measure(self, name: str, command: list[str]) -> None:
        """Run a command with the model out of the page cache; keep its seconds and its peak of memory."""
        from benchmarks import cache, memory

        os.sync()
        cache.drop(self.root)
        log = self.logs / f"{name.replace(' ', '')}.txt"
        run = memory.run(command, log, env=steps.environment())
        self.figures[f"{name}, s"] = run.wall
        if name != "cp -r":
            self.figures[f"{name}, peak GB"] = run.peak("resident") / GB


def bridge() -> list[str]:
    """Give the command `megatron-bridge` of the Python that runs this, wherever its scripts are."""
    return [sys.executable, "-c", "from megatron.bridge.cli import main; main(prog_name='megatron-bridge')"]


@dataclass(frozen=True, kw_only=True)
class Verify(matrix.Check):
    """`megatron-bridge verify` of a release, on this host's device, where there is such a command."""

    typical_s = 30

    def why_not(self, runner: matrix.Runner) -> str | None:
        """Ask the command."""
        question = [*bridge(), "verify", "--help"]
        asked = subprocess.run(question, capture_output=True, text=True, env=steps.environment())
        if asked.returncode == 0:
            return None
        return f"megatron-bridge verify: {(asked.stderr.strip().splitlines() or ['no word why not'])[-1]}"

    def run(self, runner: matrix.Runner) -> "VerifyRun":
        """Give what runs it."""
        return VerifyRun(runner, self)


class VerifyRun(matrix.Run):
    """A release that is verified."""

    def go_on(self) -> None:
        """Import the tiny model, and have the release verified against it."""
        row = matrix.Row(self.row.model, matrix.ONE)
        with self.stage("import"):
            release = self.runner.imported(row)
        with self.stage("verify"):
            command = [*bridge(), "verify", str(release), "--hf-model", str(self.runner.source(row))]
            steps.Step("verify", command, self.logs / "log.txt").run(limit_s=self.row.limit_s)
