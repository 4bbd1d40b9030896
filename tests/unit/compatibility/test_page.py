# SPDX-License-Identifier: Apache-2.0
"""The blocks of a page that sessions write, and the rest of it, which they leave alone."""

from pathlib import Path

import grid
import page
import pytest
import table
import versions


REPOSITORY = Path(__file__).parents[3]


def test_a_block_is_replaced_and_nothing_else():
    text = "# Title\n\n<!-- a:begin -->\nold\n<!-- a:end -->\n\ntext\n\n<!-- b:begin -->\n<!-- b:end -->\nend"
    changed = page.with_block(text, "a", "new\n")
    assert changed == text.replace("old", "new")
    assert page.block_of(changed, "a") == "new"
    assert page.with_block(changed, "a", "new\n") == changed
    assert page.with_block(text, "b", "| x |\n").endswith("<!-- b:begin -->\n| x |\n<!-- b:end -->\nend")
    assert page.block_of(text, "b") == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- a:begin -->\n",
        "<!-- a:end -->\n<!-- a:begin -->\n",
        "<!-- a:begin -->\n<!-- a:end -->\n<!-- a:begin -->\n<!-- a:end -->\n",
        "<!-- b:begin -->\n<!-- b:end -->\n",
    ],
)
def test_a_page_without_its_markers_is_refused(text: str):
    with pytest.raises(ValueError, match="expected <!-- a:begin --> and <!-- a:end -->, once each"):
        page.with_block(text, "a", "new")
    with pytest.raises(ValueError):
        page.block_of(text, "a")


def test_the_page_has_every_session_s_block_with_a_table_that_the_session_reads():
    text = (REPOSITORY / "docs" / "compatibility.md").read_text("utf-8")
    assert table.lines_of(page.block_of(text, table.BLOCK))
    assert grid.rows_of(page.block_of(text, versions.BLOCK)).keys() >= versions.CORES.keys()


def test_results_have_their_place_by_version():
    text, writers = "", ("0.9.1 (1.1)", "0.10.0 (1.2)")
    for reader, writer in [("0.15.3", writers[1]), ("0.9.0 of a checkout", writers[0]), ("0.2.10", writers[0])]:
        text = grid.with_result(text, reader, writer, "loads", "2026-11-27")
    assert text == (
        "| megatron-core that reads | 0.9.1 (1.1) | 0.10.0 (1.2) | date |\n"
        "| --- | --- | --- | --- |\n"
        "| 0.2.10 | loads | not tried | 2026-11-27 |\n"
        "| 0.15.3 | not tried | loads | 2026-11-27 |\n"
        "| 0.9.0 of a checkout | loads | not tried | 2026-11-27 |\n"
    )


def test_a_result_that_is_found_again_changes_nothing():
    before = grid.with_result("", "0.1.0", "0.2.0", "fails: a | b", "2026-11-27")
    assert grid.with_result(before, "0.1.0", "0.2.0", "fails: a | b", "2027-01-01") == before
    after = grid.with_result(before, "0.1.0", "0.2.0", "loads", "2027-01-01")
    assert after.splitlines()[2:] == ["| 0.1.0 | loads | 2027-01-01 |"]
