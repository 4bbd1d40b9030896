# SPDX-License-Identifier: Apache-2.0
"""The matrix as data, and the comparisons that its stages make."""

import math

import matrix
import pytest


def test_flags_of_a_layout() -> None:
    assert matrix.ONE.flags(4) == []
    assert matrix.TP2_SP.flags(4) == ["--tensor-model-parallel-size=2", "--sequence-parallel"]
    assert matrix.PP2_INTERLEAVED.flags(4)[-1] == "--num-layers-per-virtual-pipeline-stage=1"
    assert "--expert-tensor-parallel-size=1" in matrix.TP2_EP2.flags(4)


@pytest.mark.parametrize("layout", dict.fromkeys(row.layout for row in matrix.ROWS), ids=lambda layout: layout.name)
def test_ranks_hold_what_is_cut_over_them(layout: matrix.Layout) -> None:
    assert layout.ranks % (layout.tp * layout.pp) == 0
    assert layout.ranks % (layout.ep * layout.pp) == 0


def test_rows_by_name() -> None:
    assert [row.name for row in matrix.rows(["llama-3-tp2"])] == ["llama-3-tp2"]
    assert matrix.rows() == [row for row in matrix.ROWS if row.default]
    assert matrix.rows(everything=True) == list(matrix.ROWS)
    with pytest.raises(ValueError, match="no row is named 'llama-4'; choose of llama-3-1-rank"):
        matrix.rows(["llama-4"])


@pytest.mark.parametrize("expected", [{1: 2.1}, {1: math.nan}, {2: 2.0}, {}], ids=str)
def test_losses_that_differ_are_refused(expected: dict[int, float]) -> None:
    with pytest.raises(AssertionError, match="curve: apart by .* at iteration 1, expected at most 0.01"):
        matrix.expect_close({1: 2.0}, expected, 0.01, "curve")


def test_no_losses_are_refused() -> None:
    with pytest.raises(AssertionError, match="curve"):
        matrix.expect_close({}, {1: 2.0}, 0.01, "curve")


def test_equal_losses_pass() -> None:
    matrix.expect_close({2: 2.0}, {1: 3.0, 2: 2.005}, 0.01, "curve")
