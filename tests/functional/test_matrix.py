# SPDX-License-Identifier: Apache-2.0
"""Each row of the matrix is a test, and tests of the tests: rows notice what they are there to notice."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matrix
import pytest
import steps
from report import Outcome, Result


@pytest.fixture(scope="session")
def runner(workplace: Path, reports: Path) -> matrix.Runner:
    return matrix.Runner(steps.host(), workplace / "matrix", reports)


def test_row(row: matrix.Row, runner: matrix.Runner, add_to_report: Callable[[Result], None]) -> None:
    result = runner.run(row)
    add_to_report(result)
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


in_one_process_with_its_rows = pytest.mark.xdist_group("llama-3")


def only_row(**changes) -> matrix.Row:
    return replace(matrix.rows(["llama-3-1-rank"])[0], other=matrix.ONE, **changes)


@in_one_process_with_its_rows
def test_without_the_change_a_row_fails_at_the_load_stage(workplace: Path, tmp_path: Path) -> None:
    broken = matrix.Runner(steps.host(), tmp_path / "work", tmp_path / "logs", importer=upstream_s_layout)
    result = broken.run(only_row())
    assert result.outcome is Outcome.FAILED
    # Megatron-LM says so, which finds no args in the checkpoint.
    assert "failed at stage “load”" in result.headline and "num-layers" in result.headline
    assert " -- " in result.command and result.command.endswith("--row llama-3-1-rank")
    assert "num-layers" in Path(result.log).read_text()


@in_one_process_with_its_rows
def test_a_resume_without_the_optimizer_s_state_is_noticed(runner: matrix.Runner, tmp_path: Path) -> None:
    aside = copy.copy(runner)  # with its models and uninterrupted runs
    aside.logs = tmp_path
    result = aside.run(only_row(flags=("--no-load-optim",)))
    assert result.outcome is Outcome.FAILED
    assert "failed at stage “resume with 1 rank”: losses after the resume: differ by" in result.headline
