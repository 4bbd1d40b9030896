# SPDX-License-Identifier: Apache-2.0
"""The blocks of a page that sessions write, and the rest of it, which they leave alone."""

from pathlib import Path

import page
import pytest
import table


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
