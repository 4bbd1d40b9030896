# SPDX-License-Identifier: Apache-2.0
"""The table of docs/compatibility.md with the Megatron Cores that read a release checkpoint, for each writer.

A row is a reader, and a column is a writer. The last column is the date when a cell of the row last changed. A result
that didn't change leaves the page as it is.
"""

import re

from packaging.version import Version


FIRST, LAST = "megatron-core that reads", "date"
NOT_TRIED = "not tried"

Rows = dict[str, dict[str, str]]


def rows_of(text: str) -> Rows:
    """Return the cells of a table by row and column, or none if there is no table."""
    head, *lines = [_cells(line) for line in text.splitlines() if line.startswith("|")] or [[FIRST]]
    return {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines[1:]}


def with_result(text: str, reader: str, writer: str, result: str, date: str) -> str:
    """Return the table with one more result, which replaces an older one of the same reader and writer.

    Args:
        text: The old table, or nothing.
        reader: The version of megatron-core that reads, with more words for a checkout.
        writer: The version of megatron-bridge that writes, with that of megatron-core in brackets.
        result: The result.
        date: The date of the result.
    """
    rows = rows_of(text)
    row = rows.setdefault(reader, {})
    result = result.replace("|", "\\|")
    if row.get(writer) != result:
        row.update({writer: result, LAST: date})
    writers = sorted({writer for row in rows.values() for writer in row} - {LAST}, key=_version)
    lines = [[FIRST, *writers, LAST], ["---"] * (len(writers) + 2)]
    lines += [[each, *(rows[each].get(column, NOT_TRIED) for column in (*writers, LAST))] for each in _sorted(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _sorted(readers: Rows) -> list[str]:
    # Series from PyPI first, then checkouts.
    return sorted(readers, key=lambda reader: (" " in reader, _version(reader), reader))


def _version(name: str) -> Version:
    return Version(name.partition(" ")[0])
