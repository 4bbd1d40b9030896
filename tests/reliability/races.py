# SPDX-License-Identifier: Apache-2.0
"""Race exports with exports, and imports with trainings that save, and check what each race leaves.

    python tests/reliability/races.py --rounds 100 --seed 0

Each runs in a fork of a process that has imported everything. The second one of a race starts at a random moment of
the first one. A training is a process that saves as Megatron-LM does: a folder, its files, and then the tracker.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import llama_alone  # noqa: F401 - the first to import Bridge
from checkpoints import TRACKER, forked, names, run_forked
from kills import convert, export, make_bench, state


def collect(children: list[tuple[int, int]]) -> list[str]:
    """Wait for forks; return what each raised, an empty string for one that is done."""
    said = []
    for child, result in children:
        with os.fdopen(result, "rb") as pipe:
            answer = pipe.read().decode()
        os.waitpid(child, 0)
        said.append(answer if '"error"' in answer else "")
    return said


def exports(work: Path, out: Path, delay: float) -> str:
    """Export two checkpoints into one folder. One is done, and none of the other is in it."""
    first = forked(partial(export, work, "old", out))
    time.sleep(delay)
    said = collect([first, forked(partial(export, work, "new", out))])
    assert "" in said, said
    assert all("another process" in each or "expected no such path" in each for each in filter(None, said)), said
    assert names(out.parent) == {out.name}, names(out.parent)
    both = [run_forked(partial(state, work / f"exported-{name}", None))["result"] for name in ("old", "new")]
    assert run_forked(partial(state, out, None))["result"] in both, "a mix"
    return "both done" if not any(said) else "one refused"


def save(out: Path) -> None:
    """Save as a training does."""
    folder = out / "iter_0000002"
    folder.mkdir(parents=True)
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (folder / name).write_text("trained")
        time.sleep(0.005)
    (out / "tracker.new").write_text("2")
    (out / "tracker.new").replace(out / TRACKER)


def training(work: Path, out: Path, delay: float) -> str:
    """Import over a release checkpoint from which a training is running. What it saves is what the tracker names."""
    shutil.copytree(work / "old", out)
    options = {}
    importing = forked(partial(convert, work, out, options))
    time.sleep(delay)
    save(out)
    (said,) = collect([importing])
    assert (out / TRACKER).read_text() == "2", "the tracker was set back"
    assert (out / "iter_0000002" / ".metadata").read_text() == "trained"
    assert names(out) == {"release", "iter_0000002", TRACKER}, names(out)
    assert not said or "training iteration 2" in said, said
    return "import refused" if said else "import done before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="rounds of each race; default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: random")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    print(f"seed {given.seed}", flush=True)
    for race, options in ((exports, None), (training, {})):
        with tempfile.TemporaryDirectory() as folder:
            bench = make_bench(Path(folder), options)
            counts: Counter[str] = Counter()
            for number in range(given.rounds):
                out = Path(folder, str(number), "out")
                out.parent.mkdir()
                counts[race(Path(folder), out, draw.uniform(0, 1.1) * bench.seconds[options is not None])] += 1
                shutil.rmtree(out.parent)
        print(f"{race.__name__}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
