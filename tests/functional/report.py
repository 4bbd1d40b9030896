# SPDX-License-Identifier: Apache-2.0
"""Report the results of the matrix as text, JUnit XML, Markdown, and an HTML page with the loss curves.

    python tests/functional/report.py RESULTS.json … --out DIR        # all formats, for one run or several together
    python tests/functional/report.py RESULTS.json … --markdown FILE  # the format that is checked in

A row that was left out has a reason, and never counts as passed.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite
from rich.console import Console
from rich.table import Table
from rich.text import Text


Points = list[tuple[int, float]]

# Each of these curves has its own style in `report.html.jinja`. Other curves share the remaining styles.
UNINTERRUPTED, FINE_TUNE, RESUMED = "uninterrupted", "fine-tune", "resumed"
HUGGING_FACE = "Hugging Face"  # one point: the loss on the first batch
CURVES = (UNINTERRUPTED, FINE_TUNE, RESUMED)
STYLES = 6


class Outcome(StrEnum):
    """How a row ended."""

    PASSED = "passed"
    FAILED = "failed"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class Result:
    """The result of one row.

    Attributes:
        name: The row's name.
        platform: "cpu", "cuda" or "rocm".
        parallelism: The row's layout, such as "TP2 × PP2".
        model: The family.
        outcome: How it ended.
        reason: Why it failed or was left out. The first line must make sense alone.
        seconds: Wall time.
        versions: Version by package.
        command: The command that runs this row alone.
        log: The path of its log.
        curves: Loss (nats per token) by iteration, for each run; see `CURVES`.
        figures: Other measurements, by name with unit.

    Raises:
        ValueError: A row that failed or was left out has no reason.
    """

    name: str
    platform: str
    parallelism: str
    model: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    log: str = ""
    curves: Mapping[str, Points] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcome", Outcome(self.outcome))
        if self.outcome is not Outcome.PASSED and not self.reason.strip():
            raise ValueError(f"row {self.name!r} is {self.outcome} and gives no reason; say why in `reason`")

    @property
    def headline(self) -> str:
        """The first line of the reason."""
        return self.reason.strip().partition("\n")[0]

    def printable(self) -> "Result":
        """Return a copy whose texts fit every format: no terminal colours, no control characters."""
        texts = {f.name: clean(getattr(self, f.name)) for f in fields(self) if f.type is str}
        return replace(
            self,
            **texts,
            versions={clean(name): clean(version) for name, version in self.versions.items()},
            curves={clean(name): points for name, points in self.curves.items()},
            figures={clean(name): value for name, value in self.figures.items()},
        )


_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Drop terminal colours, and replace characters that XML 1.0 or a terminal can't show with U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", _COLOUR.sub("", text.replace("\r\n", "\n")))


def write(results: Sequence[Result], folder: Path) -> None:
    """Write report.txt, junit.xml, report.html and results.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save(results, folder / "results.json")
    write_text(results, folder / "report.txt")
    write_junit(results, folder / "junit.xml")
    write_html(results, folder / "report.html")


def save(results: Sequence[Result], path: Path) -> None:
    """Save results, so that several runs can be reported together."""
    path.write_text(dumps(results))


def load(path: Path) -> list[Result]:
    """Read what `save` wrote."""
    return loads(path.read_text())


def dumps(results: Sequence[Result]) -> str:
    """Return results as JSON."""
    return json.dumps([asdict(result) for result in results], indent=1)


def loads(text: str) -> list[Result]:
    """Read what `dumps` returned."""
    return [
        Result(**row | {"curves": {name: [(i, loss) for i, loss in points] for name, points in row["curves"].items()}})
        for row in json.loads(text)
    ]


def succeeded(results: Sequence[Result]) -> bool:
    """Return whether a row passed and none failed. If every row was left out, nothing was shown."""
    outcomes = Counter(result.outcome for result in results)
    return outcomes[Outcome.PASSED] > 0 and outcomes[Outcome.FAILED] == 0


def summary(results: Sequence[Result]) -> str:
    """Count the rows by outcome."""
    outcomes = Counter(result.outcome for result in results)
    return ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in Outcome)


def common_versions(results: Sequence[Result]) -> dict[str, str]:
    """Return the versions that all rows share, except for rows that have no versions."""
    first, *others = [dict(result.versions) for result in results if result.versions] or [{}]
    return {name: version for name, version in first.items() if all(o.get(name) == version for o in others)}


def own_versions(result: Result, common: Mapping[str, str]) -> str:
    """Return the versions that differ from the common ones, in one line."""
    return join({name: version for name, version in result.versions.items() if name not in common})


def join(versions: Mapping[str, str]) -> str:
    """Return versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def join_figures(figures: Mapping[str, float]) -> str:
    """Return figures in one line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


COLUMNS = ("row", "platform", "parallelism", "model", "versions", "result", "seconds", "figures", "reason")
OPTIONAL = ("versions", "figures", "reason")  # columns that are omitted if no row has a value


def cells(result: Result, common: Mapping[str, str]) -> tuple[str, ...]:
    """Return the cells of one row, in the order of `COLUMNS`; versions only if they differ from the common ones."""
    return (
        result.name,
        result.platform,
        result.parallelism,
        result.model,
        own_versions(result, common),
        result.outcome,
        "" if result.outcome is Outcome.LEFT_OUT else f"{result.seconds:.1f}",
        join_figures(result.figures),
        result.headline,
    )


def _table(results: Sequence[Result]) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Return the columns that have a value, the rows, and the versions that all rows share."""
    common = common_versions(results)
    rows = [cells(result, common) for result in results]
    kept = [i for i, name in enumerate(COLUMNS) if name not in OPTIONAL or any(row[i] for row in rows)]
    return [COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows], common


_RICH = {"passed": "green", "failed": "bold red", "left out": "dim"}


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table, each failure with the command that runs it alone, and the counts."""
    results = [result.printable() for result in results]
    columns, rows, common = _table(results)
    table = Table(title="Functional matrix", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_RICH.get(cell, "")) for cell in row))
    console.print(table)
    if common:
        console.print(Text(f"versions: {join(common)}"), soft_wrap=True)
    for result in results:
        if result.outcome is Outcome.FAILED:
            lines = ["", f"FAILED {result.name}: {result.reason}", f"  to run it alone: {result.command}"]
            console.print(Text("\n".join([*lines, f"  its log: {result.log}"])), soft_wrap=True)
    console.print(Text(summary(results), style="bold"))


def write_text(results: Sequence[Result], path: Path) -> None:
    """Write what `show` prints."""
    with path.open("w", encoding="utf-8") as out:
        show(results, Console(file=out, width=160, color_system=None, highlight=False))


def write_junit(results: Sequence[Result], path: Path) -> None:
    """Write JUnit XML: one suite per platform, with versions as properties. Rows that were left out are skipped."""
    document = JUnitXml("functional")
    results = [result.printable() for result in results]
    for platform in dict.fromkeys(result.platform for result in results):
        rows = [result for result in results if result.platform == platform]
        suite = TestSuite(f"functional.{platform}")
        common = common_versions(rows)
        for name, version in common.items():
            suite.add_property(name, version)
        suite.add_testcases([_junit_case(row, own_versions(row, common)) for row in rows])
        document.add_testsuite(suite)
    document.write(str(path), pretty=True)


def _junit_case(result: Result, versions: str) -> TestCase:
    case = TestCase(result.name, f"{result.platform}.{result.parallelism}.{result.model}", round(result.seconds, 3))
    if versions:
        case.system_out = versions
    if result.outcome is Outcome.FAILED:
        failure = Failure(result.headline)
        failure.text = f"{result.reason}\nto run it alone: {result.command}\nits log: {result.log}"
        case.result = [failure]
    elif result.outcome is Outcome.LEFT_OUT:
        case.result = [Skipped(result.reason)]
    return case


def markdown(results: Sequence[Result], when: datetime, command: str) -> str:
    """Return the format that is checked in: date, versions, table, and reasons, without paths of logs.

    Args:
        results: The rows.
        when: When they ran.
        command: The command that ran them.
    """
    results = [result.printable() for result in results]
    columns, rows, common = _table(results)
    where = " and ".join(dict.fromkeys(result.platform for result in results))
    lines = [
        f"# Functional matrix: {escape(where)}",
        "",
        f"`{command}`, {when:%-d %B %Y}: {summary(results)}.",
        "",
        *([f"Versions: {escape(join(common))}.", ""] if common else []),
        line(columns),
        line("--:" if name == "seconds" else "---" for name in columns),
        *(line(map(escape, row)) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def line(row: Any) -> str:
    return f"| {' | '.join(row)} |"


def escape(text: str) -> str:
    """Escape a text, so that Markdown and HTML show it as it is."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def write_html(results: Sequence[Result], path: Path) -> None:
    """Write the HTML page: table, failures, and one chart of the loss curves per row. It needs no network."""
    shown = [result.printable() for result in results]
    styles = curve_styles(shown)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    templates.filters |= {"versions": join, "figures": join_figures}
    templates.filters["log_link"] = lambda log: _relative(log, path.parent)
    common = common_versions(shown)
    page = templates.get_template("report.html.jinja").render(
        rows=[
            {
                "number": number,
                "result": result,
                "versions": own_versions(result, common),
                "chart": chart(result.curves, styles),
            }
            for number, result in enumerate(shown, start=1)
        ],
        counts=[(outcome, sum(result.outcome is outcome for result in shown)) for outcome in Outcome],
        common=common,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path.write_text(page, encoding="utf-8")


def _relative(log: str, folder: Path) -> str | None:
    """Return the relative address of a log below the report's folder, which survives a copy of both, or None."""
    try:
        return Path(log).absolute().relative_to(folder.absolute()).as_posix() if log else None
    except ValueError:
        return None


def curve_styles(results: Sequence[Result]) -> dict[str, int]:
    """Return the number of each curve's style, so that a name looks the same in every chart."""
    others = {name for result in results for name in result.curves} - {*CURVES, HUGGING_FACE}
    names = [*CURVES, *sorted(others)]
    left = STYLES - len(CURVES)
    return {HUGGING_FACE: STYLES} | {
        name: i if i < STYLES else len(CURVES) + (i - len(CURVES)) % left for i, name in enumerate(names)
    }


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 58, 12, 12, 42
MARKERS = 24  # more would hide the curve


@dataclass(frozen=True)
class Series:
    """One curve in pixels.

    Attributes:
        name: The run.
        style: Number of the style.
        lines: Polylines in SVG syntax. A loss that is not finite breaks the curve.
        markers: x, y (pixels), iteration, and loss of the points with a marker.
        points: All points, unchanged.
        difference: The largest difference from the uninterrupted run at an iteration that both have.
    """

    name: str
    style: int
    lines: list[str]
    markers: list[tuple[float, float, int, float]]
    points: Points
    difference: float | None


@dataclass(frozen=True)
class Chart:
    """The curves of a row, and the positions and texts of the ticks."""

    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    resumed_at: float | None

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


def chart(curves: Mapping[str, Points], styles: Mapping[str, int]) -> Chart | None:
    """Return the chart of a row's curves, or None if no loss is finite."""
    finite = [point for points in curves.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return None
    x_ticks = ticks(min(i for i, _ in finite), max(i for i, _ in finite), whole=True)
    y_ticks = ticks(min(loss for _, loss in finite), max(loss for _, loss in finite))
    x_low, x_high = min(i for i, _ in finite), max(i for i, _ in finite)
    pad = max(x_high - x_low, 1) * 0.03

    def x(i: float) -> float:
        return round(LEFT + (i - x_low + pad) / (x_high - x_low + 2 * pad) * (WIDTH - LEFT - RIGHT), 1)

    def y(loss: float) -> float:
        return round(TOP + (y_ticks[-1] - loss) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM), 1)

    reference = dict(curves.get(UNINTERRUPTED, []))
    series = []
    for name in sorted(curves, key=styles.__getitem__):
        points = sorted(curves[name])
        drawn = [(x(i), y(loss), i, loss) for i, loss in points if math.isfinite(loss)]
        difference = None if name == UNINTERRUPTED else largest_difference(points, reference)
        every = max(1, math.ceil(len(drawn) / MARKERS))
        series.append(Series(name, styles[name], _polylines(points, x, y), drawn[::every], points, difference))
    starts = [min(i for i, _ in points) for name, points in curves.items() if name.startswith(RESUMED) and points]
    return Chart(
        series,
        [(x(tick), f"{tick:g}") for tick in x_ticks if x_low <= tick <= x_high],
        [(y(tick), f"{tick:.6g}") for tick in y_ticks],
        x(min(starts)) if starts else None,
    )


def _polylines(points: Points, x: Any, y: Any) -> list[str]:
    lines: list[list[str]] = [[]]
    for i, loss in points:
        if math.isfinite(loss):
            lines[-1].append(f"{x(i)},{y(loss)}")
        else:
            lines.append([])
    return [" ".join(line) for line in lines if line]


def largest_difference(points: Points, reference: Mapping[int, float]) -> float | None:
    """Return the largest difference between two curves at the iterations that both have, or None without any."""
    distances = [abs(loss - reference[i]) for i, loss in points if i in reference]
    return max(distances, key=lambda d: math.inf if math.isnan(d) else d) if distances else None


def ticks(low: float, high: float, *, whole: bool = False, about: int = 6) -> list[float]:
    """Return two or more round numbers that enclose a range, in steps of 1, 2, or 5 times a power of ten."""
    span = max(high - low, abs(high) * 1e-6, 1.0 if whole else 1e-6)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def main() -> None:
    """Report saved results."""
    parser = argparse.ArgumentParser(description="Report the results of one or more runs together.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write all formats to DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the format that is checked in")
    parser.add_argument("--command", default="nox -s functional", help="the command for the Markdown")
    options = parser.parse_args()
    results = [result for path in options.results for result in load(path)]
    show(results, Console(highlight=False))
    if options.out:
        write(results, options.out)
    if options.markdown:
        # The day on which the rows ran, not today.
        when = datetime.fromtimestamp(max(path.stat().st_mtime for path in options.results), UTC)
        options.markdown.write_text(markdown(results, when, options.command), encoding="utf-8")


if __name__ == "__main__":
    main()
