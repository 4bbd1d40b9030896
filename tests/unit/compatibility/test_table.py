# SPDX-License-Identifier: Apache-2.0
"""The table of releases: its rows, and its place in a page that has other sections."""

import pytest
import table


VERSIONS = {"megatron-core": "0.9", "transformers": "5", "torch": "2"}
RESULTS = {"imports": "yes", "writes_release": "fails: OSError: a | b"}


def row(release: str) -> dict:
    return {"date": "2026-11-22", "versions": {"megatron-bridge": release, **VERSIONS}, "results": RESULTS}


def test_rows_are_in_the_order_of_releases():
    lines = table.table([row("0.10.0"), row("0.9.1")]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0.9.1", "| 0.10.0"]


def test_stages_that_were_not_reached_are_dashes_and_bars_are_escaped():
    *_, last = table.table([row("0.9.1")]).splitlines()
    assert last == "| 0.9.1 | 0.9 | 5 | 2 | yes | fails: OSError: a \\| b | – | – | – | 2026-11-22 |"


@pytest.mark.parametrize("after", ["", "## Later\n\ntext\n"])
def test_section_takes_the_place_of_the_one_before(after: str):
    page = f"# Title\n\n## Earlier\n\ntext\n\n## Releases\n\nold\n\n{after}"
    changed = table.with_section(page, "new\n")
    assert changed == f"# Title\n\n## Earlier\n\ntext\n\n## Releases\n\nnew\n{after and chr(10) + after}"
    assert table.with_section(changed, "new\n") == changed


def test_section_goes_last_where_there_was_none():
    assert table.with_section("# Title\n", "new") == "# Title\n\n## Releases\n\nnew\n"
