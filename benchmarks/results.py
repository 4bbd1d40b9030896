# SPDX-License-Identifier: Apache-2.0
"""Report the measurements as JSON, as tables with the bars, and as a plot."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import Run


GB = 10**9
KINDS = ("resident", "anonymous", "file")
COLUMNS = ("wall, s", "start-up, s", "sync, s", *(f"peak {kind}, GB" for kind in KINDS))

EXPORT = "streaming export"
TWO, EXPORT_TWO = "streaming, 2 processes", "streaming export, 2 processes"

_SAMPLES = 120
"""The most samples of a run that are saved: the largest of each part of it."""


@dataclass(frozen=True)
class Measurement:
    """One run of one flow.

    Attributes:
        size: A key of `shapes.SHAPES`.
        flow: A name of `flows.FLOWS`.
        round: The round, from 1.
        wall: Seconds from start to end of the command.
        started: Seconds until its conversion started, None if that is unknown.
        sync: Seconds that the disk took afterwards.
        cached: The fraction of the source that was in the page cache before.
        resident: Peak of the resident set over the process tree, in bytes.
        anonymous: Peak of its anonymous pages, in bytes.
        file: Peak of its pages of mapped files, in bytes.
        process: Largest resident set of one of its processes, in bytes.
        samples: Seconds since the start, and anonymous and file pages in bytes.
    """

    size: str
    flow: str
    round: int
    wall: float
    started: float | None
    sync: float
    cached: float
    resident: int
    anonymous: int
    file: int
    process: int
    samples: list[tuple[float, int, int]] = field(repr=False)

    @property
    def past_start_up(self) -> float:
        """Seconds from the start of the conversion to the end, or of the whole command if the start is unknown."""
        return self.wall - (self.started or 0.0)


def measurement(size: str, flow: str, number: int, run: Run, cached: float, sync: float) -> Measurement:
    """Return the part of a run that tables and plot show."""
    step = -(-len(run.samples) // _SAMPLES) or 1
    parts = [run.samples[start : start + step] for start in range(0, len(run.samples), step)]
    largest = [max(part, key=lambda sample: sample[1].resident) for part in parts]
    samples = [(round(at, 2), memory.anonymous, memory.file) for at, memory in largest]
    peaks = {kind: run.peak(kind) for kind in KINDS}
    peaks["process"] = run.high_water
    return Measurement(size, flow, number, run.wall, run.started, sync, cached, samples=samples, **peaks)


@dataclass(frozen=True)
class Bar:
    """A limit that the streaming import must keep.

    Attributes:
        name: The measured quantity.
        most: The highest value that passes.
        unit: The unit of the value; "times" for a ratio.
        value: Computes the value from the measurements of a round, by size and flow. A KeyError means that one is
            missing.
    """

    name: str
    most: float
    unit: str
    value: Callable[[dict[tuple[str, str], Measurement]], float]


def _wide(of: dict[tuple[str, str], Measurement], flow: str) -> Measurement:
    """Return the run of a flow with the most layers of the 8B shape."""
    return next(of[size, flow] for size in ("8b", "8b-6", "8b-2") if (size, flow) in of)


BARS = (
    Bar("start-up, 8B shape", 4.0, "s", lambda of: of["8b", "streaming"].started),
    Bar("peak resident set, 8B shape", 2.0, "GB", lambda of: of["8b", "streaming"].resident / GB),
    Bar(
        "peak resident set, 8B against 1.5B shape",
        1.05,
        "times",
        lambda of: of["8b", "streaming"].resident / of["1b", "streaming"].resident,
    ),
    Bar(
        "wall past start-up, 8B shape, against cp -r",
        1.25,
        "times",
        lambda of: of["8b", "streaming"].past_start_up / of["8b", "cp -r"].wall,
    ),
    Bar(
        "wall of the whole command, 8B shape, against upstream",
        0.5,
        "times",
        lambda of: of["8b", "streaming"].wall / of["8b", "upstream"].wall,
    ),
    Bar(
        "export, start-up against import's",
        1.15,
        "times",
        lambda of: _wide(of, EXPORT).started / _wide(of, "streaming").started,
    ),
    Bar(
        "export, peak resident set, width of 8B",
        1.1,
        "GB",
        lambda of: max(each.resident for (size, flow), each in of.items() if (size[:2], flow) == ("8b", EXPORT)) / GB,
    ),
    Bar(
        "export, peak resident set, 6 against 2 layers of 8B",
        1.1,
        "times",
        lambda of: of["8b-6", EXPORT].resident / of["8b-2", EXPORT].resident,
    ),
    Bar(
        "export, wall past start-up, width of 8B, against cp -r",
        1.3,
        "times",
        lambda of: _wide(of, EXPORT).past_start_up / _wide(of, "cp -r back").wall,
    ),
    Bar(
        "export, wall of the whole command, width of 8B, against upstream",
        0.5,
        "times",
        lambda of: _wide(of, EXPORT).wall / _wide(of, "upstream export").wall,
    ),
    *(
        bar
        for two, one in ((TWO, "streaming"), (EXPORT_TWO, EXPORT))
        for bar in (
            Bar(
                f"{two}, wall against one, width of 8B",
                0.65,
                "times",
                lambda of, two=two, one=one: _wide(of, two).wall / _wide(of, one).wall,
            ),
            Bar(
                f"{two}, peak resident set of a process against one, width of 8B",
                1.1,
                "times",
                lambda of, two=two, one=one: _wide(of, two).process / _wide(of, one).process,
            ),
        )
    ),
)


@dataclass(frozen=True)
class Spread:
    """The smallest, the median, and the largest of some values."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f}" if self.min == self.max else f"{self.median:.2f} ({self.min:.2f}–{self.max:.2f})"


def compare(measurements: list[Measurement]) -> Iterator[tuple[Bar, Spread | None]]:
    """Yield each bar with the spread of its values over the rounds, or None if no round has all its runs."""
    rounds = sorted({each.round for each in measurements})
    for bar in BARS:
        values = []
        for number in rounds:
            of = {(each.size, each.flow): each for each in measurements if each.round == number}
            try:
                values.append(bar.value(of))
            except (
                KeyError,
                TypeError,
                StopIteration,
                ValueError,
            ):  # it didn't run, or the start of its conversion is unknown
                continue
        yield bar, Spread.of(values) if values else None


def as_json(measurements: list[Measurement], plans: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Return everything as plain types."""
    bars = [
        {
            "name": bar.name,
            "at_most": bar.most,
            "unit": bar.unit,
            "measured": asdict(spread) if spread else None,
            "holds": spread.median <= bar.most if spread else None,
        }
        for bar, spread in compare(measurements)
    ]
    return {**about, "bars": bars, "plans": plans, "runs": [asdict(each) for each in measurements]}


def dumps(report: dict[str, Any]) -> str:
    """Return the JSON of what `as_json` returns, with one line per run, because a run has many samples."""
    about = json.dumps({name: value for name, value in report.items() if name != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run) for run in report["runs"])
    return f'{about.removesuffix("\n}")},\n "runs": [\n  {runs}\n ]\n}}\n'


def show(measurements: list[Measurement], plans: dict[str, Any], console: Console) -> None:
    """Print runs, plans, and bars as tables."""
    table = Table("size", "flow", *COLUMNS)
    for size, flow in dict.fromkeys((each.size, each.flow) for each in measurements):
        runs = [each for each in measurements if (each.size, each.flow) == (size, flow)]
        started = [each.started for each in runs if each.started is not None]
        table.add_row(
            size,
            flow,
            str(Spread.of([each.wall for each in runs])),
            str(Spread.of(started)) if started else "",
            str(Spread.of([each.sync for each in runs])),
            *(str(Spread.of([getattr(each, kind) / GB for each in runs])) for kind in KINDS),
        )
    console.print(table, "Median (smallest–largest). GB = 10^9 bytes. resident = anonymous + file.")
    if plans:
        table = Table("planned, not written", "tensors", "bytes, GB", "largest tensor, GB", "blocks held, MB")
        for size, each in plans.items():
            figures = (each["bytes"] / GB, each["largest"] / GB, each["block"] / 10**6)
            table.add_row(size, str(each["items"]), *(f"{figure:.1f}" for figure in figures))
        console.print(table)
    table = Table("bar", "at most", "measured", "")
    for bar, spread in compare(measurements):
        verdict = "not measured" if spread is None else "holds" if spread.median <= bar.most else "MISSED"
        table.add_row(bar.name, f"{bar.most} {bar.unit}", str(spread or ""), verdict)
    console.print(table)


def decimal(size: int) -> str:
    """Return bytes in GB, or in MB if there are few."""
    return f"{size / GB:.1f} GB" if size > GB / 10 else f"{size / 10**6:.0f} MB"


def plot(measurements: list[Measurement], path: Path) -> None:
    """Plot memory over time of each flow, for the largest size that all flows ran, in the round of median length.

    The import is on the left, the export on the right. A line is the resident set. The area below it, in the same
    colour, is the anonymous part.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "path.simplify_threshold": 1.0})
    from matplotlib import pyplot

    size = max(
        measurements, key=lambda each: (len({m.flow for m in measurements if m.size == each.size}), each.wall)
    ).size
    figure, panels = pyplot.subplots(1, 2, figsize=(10.8, 3.6), layout="constrained", sharey=True)
    _plot_flows(panels[0], [each for each in measurements if each.size == size], ("upstream", "cp -r", "streaming"))
    _plot_flows(
        panels[1], [each for each in measurements if each.size == size], ("upstream export", "cp -r back", EXPORT)
    )
    shape, _, layers = size.upper().partition("-")
    what = f"a model of {layers} layers of Llama-3-{shape} shape" if layers else f"a model of Llama-3-{shape} shape"
    panels[0].set(title=f"Import of {what}", ylabel="resident memory (GB)")
    panels[1].set(title=f"Export of {what}")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_flows(axes: Any, measurements: list[Measurement], flows: tuple[str, str, str]) -> None:
    for flow, color in zip(flows, ("#c44e52", "#555555", "#2a7a3b"), strict=True):
        runs = sorted((each for each in measurements if each.flow == flow), key=lambda each: each.wall)
        if not runs:
            continue
        run = runs[(len(runs) - 1) // 2]
        times = [at for at, _, _ in run.samples] + [run.wall]
        anonymous = [value / GB for _, value, _ in run.samples] + [0]
        resident = [(value + file) / GB for _, value, file in run.samples] + [0]
        label = f"{flow.removesuffix(' export').removesuffix(' back')}: {run.wall:.0f} s, {decimal(run.resident)}"
        axes.plot(times, resident, color=color, linewidth=1.6, label=label)
        axes.fill_between(times, anonymous, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="time since the start of the command (s)", xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, title="whole command, peak (shaded: anonymous pages)", alignment="left")
