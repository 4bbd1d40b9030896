# SPDX-License-Identifier: Apache-2.0
"""Every format of the report has the result of each row, whatever characters its name has."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from junitparser import JUnitXml
from report import Outcome, Result
from rich.console import Console


VERSIONS = {"torch": "2.11.0", "megatron-core": "0.19.2"}
WHOLE = [(i, 6 - i / 4) for i in range(1, 13)]
CURVES = {report.UNINTERRUPTED: WHOLE, report.FINE_TUNE: WHOLE[:6], report.RESUMED: WHOLE[6:]}

PASSED = Result("tensor parallel", "cpu", "TP2", "llama-3", "passed", seconds=61.25, versions=VERSIONS, curves=CURVES)
FAILED = Result(
    "pipeline",
    "cpu",
    "PP2",
    "llama-3.1",
    "failed",
    reason="step “resume” ended with code 1: KeyError: 'optimizer'\nmore of it",
    seconds=30,
    versions=VERSIONS,
    command='nox -s "functional(cpu)" -- --row pipeline',
    log="logs/pipeline.txt",
)
LEFT_OUT = Result("eight ways", "cpu", "TP8", "llama-3", "left out", reason="needs 8 ranks")
ALL = [PASSED, FAILED, LEFT_OUT]

# Enough fun for any form: markup of rich, Markdown, HTML and Jinja, colours, control characters, halves of a pair.
ODD = st.text(min_size=1, max_size=30) | st.sampled_from(
    [
        "[red]x[/red]",
        "a|b\nc",
        "</script><b>&amp;",
        "{{ 7 * 7 }}{% endif %}",
        "\x1b[31mred\x1b[0m",
        "\x00\x08",
        "\ud800",
        "]]>",
        "`*_~",
    ]
)
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


class Page(HTMLParser):
    """Keeps a page's tags, texts and addresses, and checks that tags are closed in order."""

    VOID = {"meta", "br", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(results: list[Result], folder: Path) -> Page:
    report.write_html(results, folder / "report.html")
    return Page((folder / "report.html").read_text("utf-8"))


def text(results: list[Result], folder: Path) -> str:
    report.write_text(results, folder / "report.txt")
    return (folder / "report.txt").read_text("utf-8")


def test_left_out_is_never_passed(tmp_path: Path) -> None:
    assert report.summary(ALL) == "1 passed, 1 failed, 1 left out"
    assert not report.succeeded(ALL)
    assert not report.succeeded([LEFT_OUT])
    assert not report.succeeded([])
    assert report.succeeded([PASSED, LEFT_OUT])


@pytest.mark.parametrize("outcome", ["failed", "left out"])
def test_a_row_without_a_reason_is_refused(outcome: str) -> None:
    with pytest.raises(ValueError, match=f"row 'tensor parallel' is {outcome} and gives no reason"):
        replace(PASSED, outcome=outcome, reason=" ")


def test_unknown_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="skipped"):
        replace(PASSED, outcome="skipped")


def test_text(tmp_path: Path) -> None:
    shown = text(ALL, tmp_path)
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "passed" in lines["tensor parallel"]
    assert "61.2" in lines["tensor parallel"]
    assert "left out" in lines["eight ways"]
    assert "needs 8 ranks" in lines["eight ways"]
    assert "passed" not in lines["eight ways"]
    assert "versions: torch 2.11.0, megatron-core 0.19.2" in shown
    assert FAILED.reason in shown
    assert f"to run it alone: {FAILED.command}\n  its log: {FAILED.log}" in shown


def test_versions_that_differ_get_a_column(tmp_path: Path) -> None:
    other = replace(PASSED, name="older", versions=VERSIONS | {"megatron-core": "0.18.2"})
    shown = text([PASSED, other], tmp_path)
    assert "versions: torch 2.11.0\n" in shown
    assert re.search(r"older .*│ megatron-core 0.18.2 ", shown)


def test_junit(tmp_path: Path) -> None:
    report.write_junit([*ALL, replace(PASSED, platform="cuda")], tmp_path / "junit.xml")
    cpu, cuda = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert (cpu.name, cpu.tests, cpu.failures, cpu.skipped) == ("functional.cpu", 3, 1, 1)
    assert (cuda.name, cuda.tests, cuda.failures, cuda.skipped) == ("functional.cuda", 1, 0, 0)
    assert {prop.name: prop.value for prop in cpu.properties()} == VERSIONS
    passed, failed, left_out = cpu
    assert passed.is_passed
    assert passed.time == 61.25
    assert failed.is_failure
    assert failed.result[0].message == FAILED.headline
    assert FAILED.command in failed.result[0].text
    assert FAILED.log in failed.result[0].text
    assert left_out.is_skipped
    assert left_out.result[0].message == "needs 8 ranks"


def test_markdown() -> None:
    lines = report.markdown(ALL, datetime(2026, 11, 22, tzinfo=UTC), 'nox -s "functional(cpu)" -- --all').splitlines()
    assert lines[0] == "# Functional matrix: cpu"
    assert lines[2] == '`nox -s "functional(cpu)" -- --all`, 22 November 2026: 1 passed, 1 failed, 1 left out.'
    assert lines[4] == "Versions: torch 2.11.0, megatron-core 0.19.2."
    assert lines[6] == "| row | platform | parallelism | model | result | seconds | reason |"
    assert lines[8] == "| tensor parallel | cpu | TP2 | llama-3 | passed | 61.2 |  |"
    assert lines[10] == "| eight ways | cpu | TP8 | llama-3 | left out |  | needs 8 ranks |"
    assert FAILED.log not in "\n".join(lines)


def test_page(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "pipeline.txt"
    shown = page([PASSED, replace(FAILED, log=str(log)), LEFT_OUT], tmp_path)
    assert "needs 8 ranks" in shown.text
    assert FAILED.reason in shown.text
    assert FAILED.command in shown.text
    assert {"row-1", "failure-2"} <= {attributes.get("id") for _, attributes in shown.tags}
    assert [link["href"] for link in shown.all("a")] == ["#row-1", "#failure-2", "logs/pipeline.txt"]
    assert len(shown.all("polyline")) == 3
    assert {"iteration", "loss (nats per token)"} <= set(shown.text)
    assert "Largest difference from the uninterrupted run: fine-tune 0, resumed 0." in shown.text


def test_page_needs_no_network(tmp_path: Path) -> None:
    shown = page(ALL, tmp_path)
    assert not shown.all("script") + shown.all("link") + shown.all("img")
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "report.html").read_text())


def test_page_without_rows(tmp_path: Path) -> None:
    assert page([], tmp_path).all("svg") == []


@SHARED_FOLDER
@given(name=ODD, reason=ODD.filter(str.strip), versions=st.dictionaries(ODD, ODD, max_size=2))
def test_odd_names_survive_every_form(tmp_path: Path, name: str, reason: str, versions: dict[str, str]) -> None:
    row = Result(name, "cpu", name, name, "left out", reason=reason, versions=versions, curves={name: [(1, 2.0)]})
    report.write([row, PASSED], tmp_path)
    assert report.load(tmp_path / "results.json") == [row, PASSED]
    (suite,) = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    case, _ = suite
    assert case.is_skipped
    assert (suite.tests, suite.skipped) == (2, 1)
    shown = Page((tmp_path / "report.html").read_text("utf-8"))
    assert not shown.all("script") + shown.all("b")[3:]
    assert "".join(report.clean(name).split()) in "".join("".join(shown.text).split())
    assert "49" not in shown.text
    table = [line for line in report.markdown([row, PASSED], datetime.now(UTC), "x").split("\n") if line[:1] == "|"]
    assert len(table) == 4
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}) == 1
    assert "1 passed, 0 failed, 1 left out" in (tmp_path / "report.txt").read_text("utf-8")


def test_colours_of_a_terminal_are_dropped() -> None:
    assert report.clean("\x1b[1;31mKeyError\x1b[0m\r\n\x07") == "KeyError\n\ufffd"


def test_chart() -> None:
    drawn = report.chart(CURVES, report.curve_styles([PASSED]))
    assert [series.name for series in drawn.series] == [report.UNINTERRUPTED, report.FINE_TUNE, report.RESUMED]
    assert [series.style for series in drawn.series] == [0, 1, 2]
    assert [series.difference for series in drawn.series] == [None, 0, 0]
    assert drawn.resumed_at == drawn.series[2].markers[0][0]
    assert [text for _, text in drawn.x_ticks] == ["2", "4", "6", "8", "10", "12"]
    assert [text for _, text in drawn.y_ticks] == ["3", "3.5", "4", "4.5", "5", "5.5", "6"]
    whole = drawn.series[0].lines[0].split()
    assert drawn.series[1].lines[0].split() + drawn.series[2].lines[0].split() == whole


def test_a_curve_that_strays_shows_by_how_much() -> None:
    strayed = [(i, loss + (0.25 if i == 9 else 0)) for i, loss in WHOLE[6:]]
    drawn = report.chart(CURVES | {report.RESUMED: strayed}, report.curve_styles([PASSED]))
    assert drawn.series[2].difference == 0.25


def test_a_loss_that_is_not_finite_breaks_the_curve() -> None:
    broken = [(1, 5.0), (2, 4.0), (3, math.nan), (4, math.inf), (5, 3.0)]
    drawn = report.chart({report.UNINTERRUPTED: WHOLE, "other": broken}, {report.UNINTERRUPTED: 0, "other": 3})
    assert [len(line.split()) for line in drawn.series[1].lines] == [2, 1]
    assert math.isnan(drawn.series[1].difference)


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_nothing_to_draw(points: report.Points) -> None:
    assert report.chart({report.FINE_TUNE: points}, report.curve_styles([])) is None


def test_long_curves_have_few_markers() -> None:
    drawn = report.chart({report.FINE_TUNE: [(i, 1 / (i + 1)) for i in range(1000)]}, report.curve_styles([]))
    assert len(drawn.series[0].markers) <= report.MARKERS
    assert len(drawn.series[0].lines[0].split()) == 1000


def test_each_name_has_one_style_everywhere() -> None:
    names = [f"resumed with PP{n}" for n in range(9)]
    styles = report.curve_styles([replace(PASSED, curves={name: WHOLE, report.HUGGING_FACE: WHOLE}) for name in names])
    assert [styles[name] for name in report.CURVES] == [0, 1, 2]
    assert {styles[name] for name in names} == {3, 4, 5}
    assert styles[report.HUGGING_FACE] == report.STYLES == 6


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
def test_ticks_enclose_the_range(low: float, span: float, whole: bool) -> None:
    chosen = report.ticks(low, low + span, whole=whole)
    slack = 1e-9 * max(1, abs(low), span)
    assert chosen[0] <= low + slack
    assert chosen[-1] >= low + span - slack
    assert 2 <= len(chosen) <= 9
    assert chosen == sorted(set(chosen))
    assert not whole or all(tick == int(tick) for tick in chosen)


def test_command_line_joins_runs(tmp_path: Path) -> None:
    report.save([PASSED], tmp_path / "one.json")
    report.save([LEFT_OUT], tmp_path / "two.json")
    command = [sys.executable, report.__file__, str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--markdown", str(tmp_path / "cpu.md")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("1 passed, 0 failed, 1 left out\n")
    kept = ["junit.xml", "report.html", "report.txt", "results.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == kept
    assert report.load(tmp_path / "out" / "results.json") == [PASSED, LEFT_OUT]
    assert f", {datetime.now(UTC):%-d %B %Y}: 1 passed, 0 failed, 1 left out." in (tmp_path / "cpu.md").read_text()


def test_show_keeps_to_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([PASSED, LEFT_OUT], Console(width=60))
    assert all(len(line) <= 60 for line in capsys.readouterr().out.splitlines() if "│" in line)


def test_outcomes_are_all_told_apart_without_colour(tmp_path: Path) -> None:
    said = " ".join(page(ALL, tmp_path).text)
    assert all(f"{sign} {outcome}" in said for sign, outcome in zip("✓✕–", Outcome, strict=True))
