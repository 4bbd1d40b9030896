# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/compatibility.md that sessions write, each between markers of its own.

    <!-- releases:begin -->
    | what the session `compatibility` writes |
    <!-- releases:end -->

All else on the page is written by people, and no session touches it.
"""

import re


def block_of(page: str, name: str) -> str:
    """Return what stands between the markers of `name`.

    Raises:
        ValueError: The page doesn't have these two markers once each, in this order.
    """
    return page[slice(*_place(page, name))].strip("\n")


def with_block(page: str, name: str, block: str) -> str:
    """Return the page with `block` between the markers of `name`, and nothing else changed.

    Raises:
        ValueError: As `block_of`.
    """
    start, end = _place(page, name)
    return f"{page[:start]}\n{block.strip()}\n{page[end:]}"


def _place(page: str, name: str) -> tuple[int, int]:
    begin, end = markers = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    found = [match[0] for match in re.finditer("|".join(map(re.escape, markers)), page)]
    if found != list(markers):
        raise ValueError(f"the page has the markers {found}, expected {begin} and {end}, once each: put them there")
    return page.index(begin) + len(begin), page.index(end)
