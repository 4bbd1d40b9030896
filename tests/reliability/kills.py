# SPDX-License-Identifier: Apache-2.0
"""Kill imports or exports with SIGKILL, check what each leaves, and check that the next one repairs it.

    python tests/reliability/kills.py --kills 200 --seed 0
    python tests/reliability/kills.py --export

Each import runs in a fork of a process that has imported everything, so it takes about a second. Half of the kills
come at random times. The other half come at changes to the file system, each change at least once. So they also hit
the short moments between writing the payload and writing the tracker. Half of the imports write to an empty folder,
the other half replace an older release checkpoint. It is the same with exports, which replace an older export.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import llama_alone  # noqa: F401 - the first to import Bridge
from checkpoints import PAYLOAD, TRACKER, AutoBridge, digest, forked, names, run_forked, save_hf_model

from megatron.bridge.release_checkpoint.layout import ITERATION_0


CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
WHEN = ("before the first write", "while the payload was written", "between the renames", "after the import")


@dataclass(frozen=True)
class Kill:
    """The moment when one import is killed.

    Attributes:
        over: Whether the import replaces an older release checkpoint.
        at: A time as a fraction of an import, or the number of a change to the file system.
    """

    over: bool
    at: float | int


@dataclass(frozen=True)
class Bench:
    """Two models, what an import or an export of the older one wrote, and how long that of the newer one takes.

    Attributes:
        options: Further arguments of `import_ckpt`, None for exports.
        seconds: The seconds of an import, by whether it replaces the older release checkpoint.
        changes: The number of its changes to the file system, by the same.
    """

    work: Path
    options: dict[str, Any] | None
    old: str
    new: str
    seconds: dict[bool, float]
    changes: dict[bool, int]

    def run(self, kill: Kill) -> tuple[str, bool]:
        """Kill an import and inspect what it leaves. Return when the kill came, and whether it left a checkpoint.

        Raises:
            AssertionError: The tracker names neither checkpoint, or the next import failed.
        """
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out = prepare(self.work, Path(folder) / "out", kill.over, self.options)
            work = partial(convert, self.work, out, self.options)
            by_time = isinstance(kill.at, float)
            child, result = forked(work if by_time else partial(killed_at_change, kill.at, out, work))
            if by_time:
                time.sleep(kill.at * self.seconds[kill.over])
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(result)
            seen = run_forked(partial(self.inspect, out, kill.over))
            assert "error" not in seen, f"{kill}: {seen}"
            return tuple(seen["result"])

    def inspect(self, out: Path, over: bool) -> tuple[str, bool]:
        """Check what a kill left, import again, and check the result."""
        # An export is staged beside its folder.
        root, whole = (out.parent, {out.name}) if self.options is None else (out, {"release", TRACKER})
        found, named = names(root), state(out, self.options)
        assert named in (None, self.old if over else None, self.new), f"an incomplete one: {found}"
        whole |= {ITERATION_0} if (self.options or {}).get("link_iter_0") else set()
        leftovers = found - whole
        is_there = ("release" if self.options is not None else out.name) in found
        if named == self.new and not leftovers:
            when = 3
        elif not leftovers and named == (self.old if over else None) and is_there == over:
            when = 0
        elif named == self.new or named is None and (over or is_there):
            when = 2
        else:
            when = 1
        convert(self.work, out, self.options)
        assert state(out, self.options) == self.new, "the next one wrote something else"
        assert names(root) == whole, f"the next one left {names(root)}"
        assert self.options is None or names(out / "release") == PAYLOAD
        return WHEN[when], named is not None


def prepare(work: Path, out: Path, over: bool, options: dict[str, Any] | None) -> Path:
    if over:
        shutil.copytree(work / ("exported-old" if options is None else "old"), out)
    return out


def convert(work: Path, out: Path, options: dict[str, Any] | None) -> None:
    if options is None:
        export(work, "new", out)
    else:
        AutoBridge.import_ckpt(work / "hf-new", out, **options)


def export(work: Path, name: str, out: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(work / f"hf-{name}")
    bridge.export_ckpt(work / name, out, show_progress=False, overwrite=out.exists())


def state(out: Path, options: dict[str, Any] | None) -> str | None:
    """Return what stands for every bit of a checkpoint or an export, None if there is none."""
    if options is not None:
        return digest(out)
    files = sorted(out.iterdir()) if out.exists() else []
    return (
        hashlib.sha256(repr([(file.name, file.read_bytes()) for file in files]).encode()).hexdigest()
        if files
        else None
    )


def at_each_change(folder: Path, act: Callable[[], None]) -> None:
    """Call `act` before this process changes something below `folder`."""

    def hook(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | os.PathLike):
            changes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            changes = event in CHANGES
        # shutil.rmtree passes file names relative to the descriptor of their folder.
        if changes and (not os.path.isabs(args[0]) or str(args[0]).startswith(str(folder))):
            act()

    sys.addaudithook(hook)


def killed_at_change(number: int, folder: Path, work: Callable[[], None]) -> None:
    left = iter(range(number))
    at_each_change(folder, lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
    work()


def measured(folder: Path, work: Callable[[], None]) -> tuple[float, int, list[str]]:
    """Run `work`. Return its seconds, its changes below `folder`, and the modules that it imported."""
    before, counted = set(sys.modules), []
    at_each_change(folder, lambda: counted.append(1))
    start = time.monotonic()
    work()
    return time.monotonic() - start, len(counted), sorted(set(sys.modules) - before)


def make_bench(work: Path, options: dict[str, Any] | None) -> Bench:
    """Make the models and what is older in forks, because this process must not start threads."""

    def answer(function: Callable[[], Any]) -> Any:
        seen = run_forked(function)
        assert "error" not in seen, seen
        return seen["result"]

    def references() -> tuple[str | None, str | None]:
        for name, layers in (("old", 1), ("new", 2)):
            save_hf_model(work / f"hf-{name}", num_hidden_layers=layers)
            AutoBridge.import_ckpt(work / f"hf-{name}", work / name)
            if options is None:
                export(work, name, work / f"exported-{name}")
        prefix = "exported-" if options is None else ""
        return state(work / f"{prefix}old", options), state(work / f"{prefix}new", options)

    def trial(over: bool) -> tuple[float, int, list[str]]:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            out = prepare(work, Path(folder) / "out", over, options)
            return answer(partial(measured, out, partial(convert, work, out, options)))

    old, new = answer(references)
    # Otherwise each fork would import the lazily imported modules again.
    for module in trial(False)[2]:
        if module.startswith(("megatron.", "torch.", "transformers.")):
            __import__(module)
    gc.freeze()
    trials = {over: [trial(over) for _ in range(3)] for over in (False, True)}
    seconds = {over: statistics.median(each[0] for each in some) for over, some in trials.items()}
    return Bench(work, options, old, new, seconds, {over: some[0][1] for over, some in trials.items()})


def plan(bench: Bench, kills: int, seed: int) -> list[Kill]:
    """Return the kills in random order.

    Raises:
        ValueError: There are fewer kills than changes to the file system.
    """
    draw, half = random.Random(seed), kills // 2
    if half < (least := max(bench.changes.values())):
        raise ValueError(f"found --kills {kills}, but one makes {least} changes: pass at least {2 * least}")
    moments = []
    for over, count in bench.changes.items():
        by_change = max(half // 2, count)
        # Every change comes once before any comes twice.
        numbers = islice(cycle(draw.sample(range(count), count)), by_change)
        moments += [Kill(over, number) for number in numbers]
        # Go a little beyond the end, to hit the last steps although imports differ in length.
        moments += [Kill(over, draw.uniform(0, 1.1)) for _ in range(half - by_change)]
    return draw.sample(moments, len(moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="number of kills; default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: random")
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON", help="extra arguments of import_ckpt"
    )
    parser.add_argument("--export", action="store_true", help="kill exports, not imports")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(Path(folder), None if given.export else given.options)
        print(f"seed {given.seed}; one takes {bench.seconds} s and makes {bench.changes} changes", flush=True)
        kills = plan(bench, given.kills, given.seed)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
            seen = list(pool.map(bench.run, kills))
    for over in (False, True):
        counts = Counter(when for kill, (when, _) in zip(kills, seen, strict=True) if kill.over == over)
        absent = sum(not present for kill, (_, present) in zip(kills, seen, strict=True) if kill.over == over)
        counts = {when: counts[when] for when in WHEN}
        print(json.dumps({"over": over, "kills": sum(counts.values()), "no checkpoint": absent, **counts}))


if __name__ == "__main__":
    main()
