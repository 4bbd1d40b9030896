# SPDX-License-Identifier: Apache-2.0
"""The size of a change over a made-up upstream, and the rules of the stack."""

from dataclasses import replace
from pathlib import Path

import pytest

from fork import measure, stack
from fork.change import Change, Sweep, insert_before_heading
from fork.edits import File, add_parameter, call, insert_first, pass_argument
from fork.upstream import Upstream


pytest.importorskip("ruff", reason="the group fork has it")


@pytest.fixture
def size(change: Change, modules: Path, upstream: Upstream, upstream_wheel: Path):
    def size(**changed) -> measure.Size:
        return measure.measure(upstream, upstream_wheel, [replace(change, **changed)], modules)[0]

    return size


def test_lines_are_those_of_the_commit(size):
    assert size().lines == {
        "src/megatron/bridge/saving.py": (1, 1),
        "src/megatron/bridge/new/extra.py": (1, 0),
        "pyproject.toml": (1, 1),
    }


def test_code_that_upstreams_formatter_changes_counts_as_it_leaves_it(size, modules: Path):
    (modules / "new" / "extra.py").write_text("VALUES = [\n1,\n2]\n")
    assert size().lines["src/megatron/bridge/new/extra.py"] == (1, 0)
    (modules / "new" / "extra.py").write_text("VALUES = [1, 2,]\n")
    assert size().lines["src/megatron/bridge/new/extra.py"] == (4, 0)


def test_tests_that_travel_count(size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "test_value.py").write_text("def test_value():\n    assert True\n")
    monkeypatch.setattr(stack, "REPOSITORY", tmp_path)
    measured = size(tests={"test_value.py": "training/"}, functional={"test_value.py": "ckpts/test_value.py"})
    assert measured.lines["tests/unit_tests/training/test_value.py"] == (2, 0)
    assert measured.below("tests") == 2 + 2 + measure.LAUNCHER


def test_what_the_wheel_lacks_is_estimated_by_the_edits(size):
    later, gone = insert_first("f", "a = 1\nb = 2"), add_parameter("f", "a=1", releases="<0.1")
    measured = size(
        upstream_tests=[File("tests/a.py", [pass_argument("", call("f"), "a=1", count=2), later, gone])],
        docs=[
            insert_before_heading("docs/a.md", "# A", "# B\n\ntext\n\n"),
            insert_before_heading("docs/a.md", "C", "D"),
        ],
        sweeps=[Sweep("say words", "a", "b", {"docs/b.md": 3})],
    )
    assert measured.lines["tests/a.py"] == (2, 2)
    assert measured.lines["docs/a.md"] == (5, 1)
    assert measured.lines["docs/b.md"] == (3, 3)
    assert measured.below("docs") == 12


TOLD = {"problem": "p", "changes": ["c"], "unchanged": ["u"], "tested": ["t"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"limit": 4}, "change example: 5 changed lines, expected at most 4; cut it in two"),
        ({"limit": 500}, "change example: expected the reason of a limit above 400; say it in `limit_reason`"),
        ({"limit": 500, "limit_reason": "a table"}, None),
        (
            {"limit": 700, "limit_reason": "a table"},
            "change example: the limit is 700, expected at most 600; cut the change in two",
        ),
        (
            {"stands_on": ["later"]},
            "change example: stands on later, which does not come before it; renumber the changes",
        ),
        (
            {"problem": "", "unchanged": []},
            "change example: expected problem, unchanged for the text of its pull request, found none",
        ),
    ],
)
def test_change_against_the_rules_is_told(size, changed: dict, message: str | None):
    assert measure.problems([size(**TOLD | changed)]) == ([message] if message else [])


def test_two_changes_of_one_name_are_told(size):
    message = "change example: expected a name of its own, found two of this name; rename one of them"
    assert measure.problems([size(**TOLD), size(**TOLD)]) == [message]
