# SPDX-License-Identifier: Apache-2.0
"""Write the table of releases in docs/compatibility.md from the rows that check.py has left.

    python tests/compatibility/table.py dist/compatibility docs/compatibility.md

Only what is between the markers `releases` is written (`page.py`), and the lines of releases that were not tried again
stay.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import page


BLOCK = "releases"
VERSIONS = ("megatron-bridge", "megatron-core", "transformers", "torch")
CHANGES = {
    "untrusted-checkpoints": {"refuses_code": "refuses"},
    "release-checkpoints": {"writes_release": "layout", "loads_in_core": "loads", "trains": "trains"},
    "conversion-without-cuda": {"exports": "exports"},
    "streaming-import": {"streams": "streams"},
    "requirements": {"imports": "imports"},
    "command-line": {"inspects": "inspects"},
    "model-files": {"keeps_files": "keeps"},
    "export-model-files": {"gives_files_back": "files"},
    "source-config": {"gives_config_back": "config"},
}
"""The stages of check.py that show each change of the stack, and what the table calls them."""
HEADER = [*VERSIONS, "change", "result", "date"]


def table(rows: list[dict], kept: Sequence[str] = ()) -> str:
    """Returns the rows as Markdown, oldest release first, a line for each change of the stack.

    Args:
        rows: what check.py has left.
        kept: lines of the table as it was; those of other releases stay.
    """
    lines = {row["versions"]["megatron-bridge"]: _lines(row) for row in rows}
    for line in kept:
        release = line.split("|")[1].strip()
        if release not in {row["versions"]["megatron-bridge"] for row in rows}:
            lines.setdefault(release, []).append(line)
    order = sorted(lines, key=lambda release: [int(part) for part in release.split(".")])
    return (
        "\n".join([_line(HEADER), _line(["---"] * len(HEADER)), *(line for each in order for line in lines[each])])
        + "\n"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(row: dict) -> list[str]:
    versions = [row["versions"][package] for package in VERSIONS]
    lines = []
    for change, stages in CHANGES.items():
        results = [f"{name}: {row['results'].get(stage, 'not reached')}" for stage, name in stages.items()]
        lines.append(_line([*versions, change, "; ".join(results).replace("|", "\\|"), row["date"]]))
    return lines


def lines_of(block: str) -> list[str]:
    """Returns the lines below the table's head, none if `block` is another table or none."""
    head, *lines = block.splitlines() or [""]
    return lines[1:] if head == _line(HEADER) else []


def main() -> None:
    """Write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help="the folder of check.py's JSON files")
    parser.add_argument("page", type=Path, help="the Markdown file")
    given = parser.parse_args()
    rows = [json.loads(path.read_text("utf-8")) for path in given.rows.glob("*.json")]
    text = given.page.read_text("utf-8")
    block = table(rows, lines_of(page.block_of(text, BLOCK)))
    given.page.write_text(page.with_block(text, BLOCK, block), "utf-8")


if __name__ == "__main__":
    main()
