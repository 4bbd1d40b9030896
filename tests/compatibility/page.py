# SPDX-License-Identifier: Apache-2.0
"""Read and write the blocks of docs/compatibility.md that belong to sessions. Each block is between two markers.

    <!-- releases:begin -->
    | the table of the session `compatibility` |
    <!-- releases:end -->

People write the rest of the page, and no session changes it.
"""

import re


def block_of(page: str, name: str) -> str:
    """Return the text between the markers of `name`.

    Raises:
        ValueError: The page doesn't have both markers exactly once, in this order.
    """
    return page[slice(*_place(page, name))].strip("\n")


def with_block(page: str, name: str, block: str) -> str:
    """Return the page with `block` between the markers of `name`.

    Raises:
        ValueError: As `block_of`.
    """
    start, end = _place(page, name)
    return f"{page[:start]}\n{block.strip()}\n{page[end:]}"


def _place(page: str, name: str) -> tuple[int, int]:
    begin, end = markers = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    found = [match[0] for match in re.finditer("|".join(map(re.escape, markers)), page)]
    if found != list(markers):
        raise ValueError(f"found the markers {found} in the page, expected {begin} and {end}, once each: add them")
    return page.index(begin) + len(begin), page.index(end)
