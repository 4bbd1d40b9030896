# SPDX-License-Identifier: Apache-2.0
"""Compare the streaming conversion with a copy and with upstream's, in both directions: `nox -s benchmark`.

Writes results.json and memory.svg beside this file. The disk needs room for the models of all sizes, and for two more
of the largest.
"""

import argparse
import importlib.metadata
import io
import os
import platform
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import memory, results, start_up
from benchmarks.flows import FLOWS, STREAMING, measure
from benchmarks.results import GB, Measurement
from benchmarks.shapes import SHAPES, WRITTEN, Shape, llama
from benchmarks.weights import write_checkpoint


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "functional"))
from tokenizer import train_tokenizer  # noqa: E402


VERSIONS = ("megatron-bridge", "megatron-core", "torch", "transformers")
MARGIN = 10**9
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}

console = Console(width=150)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="nox -s benchmark --", description=__doc__)
    parser.add_argument(
        "--sizes",
        default="1b,3b,8b",
        help="sizes to run, separated by commas, such as 8b-2,8b-6 for a short run; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each flow; default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "dist", help="a folder for checkpoints, on the disk to test"
    )
    parser.add_argument("--keep", action="store_true", help="keep the Hugging Face checkpoints")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if unknown := set(sizes) - set(WRITTEN):
        parser.error(f"found {', '.join(sorted(unknown))} in --sizes, expected some of {','.join(WRITTEN)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix="benchmark-", delete=not options.keep) as folder:
        measurements, skipped = run(Path(folder), sizes, options.rounds, options.keep)
        model, checkpoint = Path(folder, "small"), Path(folder, "small-checkpoint")
        starts = start_up.measure(model, checkpoint, Path(folder), options.rounds)
    plans = {size: planned(size) for size in SHAPES if size not in WRITTEN}
    report = results.as_json(measurements, plans, about() | {"skipped": skipped, "start_up": [*start_up.rows(starts)]})
    (HERE / "results.json").write_text(results.dumps(report))
    results.show(measurements, plans, console)
    start_up.show(starts, console)
    for line in skipped:
        console.print(line)
    if measurements:
        results.plot(measurements, HERE / "memory.svg")
        console.print("wrote benchmarks/results.json and benchmarks/memory.svg")


def run(folder: Path, sizes: list[str], rounds: int, keep: bool) -> tuple[list[Measurement], list[str]]:
    """Write the checkpoints, and run every flow on each in turn.

    Returns:
        The measurements, and a line for each size or flow that doesn't fit on this host.
    """
    measurements, skipped, sources, largest = [], [], {}, 0
    for size in sizes:
        shape = llama(size)
        # The sources stay, so that all sizes run in each round. Only one checkpoint and one target exist at a time.
        needed = shape.bytes + 2 * max(shape.bytes, largest) + MARGIN
        if needed > (free := shutil.disk_usage(folder).free):
            skipped.append(f"skipped {size}: needs {needed / GB:.0f} GB of disk, and {free / GB:.0f} GB are free")
            continue
        console.print(f"writing {size}, {shape.bytes / GB:.1f} GB")
        sources[size], largest = write(folder / size, shape), max(shape.bytes, largest)
    small = write(folder / "small", llama("1b", **SMALL))
    imported(small, folder / "small-checkpoint")
    for number in range(1, rounds + 1):
        for size, source in sources.items():
            for flow in FLOWS:
                if flow.exports and not (folder / "checkpoint").exists():
                    imported(source, folder / "checkpoint")
                needed = flow.memory * llama(size).bytes
                if needed > psutil.virtual_memory().available:
                    line = f"skipped {flow.name} of {size}: needs {needed / GB:.1f} GB of memory"
                    skipped += [line] if line not in skipped else []
                    continue
                log = folder / f"{size}-{flow.name.replace(' ', '-')}-{number}.log"
                # This puts the imported modules into the page cache, because the last flow may have needed all memory.
                warm, read = (folder / "small-checkpoint", folder / "checkpoint") if flow.exports else (small, source)
                measure(flow, warm, folder / "target", log)
                done, cached, sync = measure(flow, read, folder / "target", log)
                measurements.append(results.measurement(size, flow.name, number, done, cached, sync))
                console.print(
                    f"round {number}, {size}, {flow.name}: {done.wall:.1f} s, {done.peak('resident') / GB:.2f} GB"
                )
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            if number == rounds and not keep:
                shutil.rmtree(source)
    return measurements, skipped


def write(folder: Path, shape: Shape) -> Path:
    """Write a checkpoint with a small tokenizer. The configuration has the shape's own vocabulary size."""
    write_checkpoint(folder, shape)
    train_tokenizer(folder)
    return folder


def imported(source: Path, checkpoint: Path) -> None:
    """Make a Megatron checkpoint, for the exports."""
    memory.run([*STREAMING.command, str(source), str(checkpoint)], checkpoint.with_suffix(".log"))


def planned(size: str) -> dict[str, int]:
    """Return the plan of a size, and hide what packages print meanwhile."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from benchmarks.plan import plan

        return asdict(plan(llama(size)))


def about() -> dict[str, Any]:
    """Return date, host, versions, and methods of the measurements."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "host": {
            "cpus": os.cpu_count(),
            "memory": psutil.virtual_memory().total,
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "flows": {flow.name: flow.description for flow in FLOWS},
        "page_cache": "the checkpoint's files are dropped before each run (posix_fadvise); everything else is warm, "
        "because the flow has just run on a small model; sync is the time of the disk after the command has ended, "
        "and no wall time includes it",
        "memory": "sums over the process tree from /proc/PID/smaps_rollup: anonymous pages, pages of mapped files, "
        "and resident, which is the sum of both; the bars are about resident",
    }


if __name__ == "__main__":
    main()
