# SPDX-License-Identifier: Apache-2.0
"""Write the table of upstream versions in docs/compatibility.md from the rows of check.py.

    python tests/compatibility/table.py dist/compatibility docs/compatibility.md

It writes only between the markers `releases` (`page.py`), and keeps the lines of upstream versions that were not
tested again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import page


BLOCK = "releases"
VERSIONS = ("megatron-bridge", "megatron-core", "transformers", "torch")
CAPABILITIES = {
    "installation": {"imports": "imports"},
    "release checkpoint": {"writes_release": "layout", "loads_in_core": "loads", "trains": "trains"},
    "export without CUDA": {"exports": "exports"},
    "files of the model": {"keeps_files": "keeps", "gives_files_back": "files", "gives_config_back": "config"},
    "streaming": {"streams": "streams"},
    "code in checkpoints": {"refuses_code": "refuses"},
    "command": {"inspects": "inspects"},
}
"""For each capability of a fork build, the stages of check.py that show it, and their names in the table."""
HEADER = [*VERSIONS, "capability", "result", "date"]


def table(rows: list[dict], kept: Sequence[str] = ()) -> str:
    """Return the rows as Markdown, oldest upstream version first, with a line for each capability.

    Args:
        rows: The rows of check.py.
        kept: The lines of the old table. Those of other upstream versions stay.
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
    for capability, stages in CAPABILITIES.items():
        results = [f"{name}: {row['results'].get(stage, 'not reached')}" for stage, name in stages.items()]
        lines.append(_line([*versions, capability, "; ".join(results).replace("|", "\\|"), row["date"]]))
    return lines


def lines_of(block: str) -> list[str]:
    """Return the lines below the table's head, or none if `block` is not this table."""
    head, *lines = block.splitlines() or [""]
    return lines[1:] if head == _line(HEADER) else []


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help="the folder with the JSON files of check.py")
    parser.add_argument("page", type=Path, help="the Markdown file")
    given = parser.parse_args()
    rows = [json.loads(path.read_text("utf-8")) for path in given.rows.glob("*.json")]
    text = given.page.read_text("utf-8")
    block = table(rows, lines_of(page.block_of(text, BLOCK)))
    given.page.write_text(page.with_block(text, BLOCK, block), "utf-8")


if __name__ == "__main__":
    main()
