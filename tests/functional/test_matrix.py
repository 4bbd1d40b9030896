# SPDX-License-Identifier: Apache-2.0
"""Each row of the matrix is a test, and tests of the tests: rows notice what they are there to notice."""

import copy
from dataclasses import replace
from pathlib import Path

import matrix
import pytest
import steps
from report import Outcome, Result


@pytest.fixture(scope="session")
def runner(workplace: Path, reports: Path) -> matrix.Runner:
    return matrix.Runner(steps.host(), workplace / "matrix", reports)


def test_row(row: matrix.Row, runner: matrix.Runner, results: list[Result]) -> None:
    result = runner.run(row)
    results.append(result)
    if result.outcome is Outcome.LEFT_OUT:
        pytest.skip(result.reason)
    if result.outcome is Outcome.FAILED:
        pytest.fail(
            f"{result.reason}\n\nto run this row alone: {result.command}\nits log: {result.log}", pytrace=False
        )


def test_default_set_covers_every_layout_and_family() -> None:
    chosen, small = matrix.rows(), [row for row in matrix.ROWS if not row.changes]
    assert {row.layout for row in chosen} == {row.layout for row in small}
    assert {row.model for row in chosen} == {row.model for row in small}
    assert len({row.name for row in matrix.ROWS}) == len(matrix.ROWS)


def upstream_s_layout(source: Path, target: Path) -> None:
    """Do what Bridge does without this project's first change: no `release/`, no args, tracker 0.

    The wheel of upstream itself can't stand in: without the second change it doesn't import on a host without CUDA.
    """
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(source, target, release=False)


def only_row(**changes) -> matrix.Row:
    return replace(matrix.rows(["llama-3-1-rank"])[0], other=matrix.ONE, **changes)


def test_without_the_change_a_row_fails_at_the_load_stage(workplace: Path, tmp_path: Path) -> None:
    broken = matrix.Runner(steps.host(), tmp_path / "work", tmp_path / "logs", importer=upstream_s_layout)
    result = broken.run(only_row())
    assert result.outcome is Outcome.FAILED
    assert "failed at stage “load”" in result.headline
    assert result.command.endswith("-- --row llama-3-1-rank")
    assert Path(result.log).exists()


def test_a_resume_without_the_optimizer_s_state_is_noticed(runner: matrix.Runner, tmp_path: Path) -> None:
    aside = copy.copy(runner)  # with its models and uninterrupted runs
    aside.logs = tmp_path
    result = aside.run(only_row(flags=("--no-load-optim",)))
    assert result.outcome is Outcome.FAILED
    assert "failed at stage “resume with 1 rank”: resumed, and the uninterrupted run: apart by" in result.headline


def test_a_row_that_does_not_fit_says_why(runner: matrix.Runner) -> None:
    result = runner.run(only_row(layout=matrix.Layout("TP64", ranks=64, tp=64)))
    assert result.outcome is Outcome.LEFT_OUT
    assert "needs 64" in result.reason
    result = runner.run(only_row(megatron_core="<0.1"))
    assert result.outcome is Outcome.LEFT_OUT
    assert "needs megatron-core <0.1" in result.reason
