# SPDX-License-Identifier: Apache-2.0
"""Write the table of releases in docs/compatibility.md from the rows that check.py has left.

    python tests/compatibility/table.py dist/compatibility docs/compatibility.md

Only the section `## Releases` is written; what else stands in the file stays, and so do the lines of releases that
were not tried again.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path


HEADING = "## Releases"
ABOUT = """\
Written by `python3 -m nox -s compatibility`, which builds on each release, installs the wheel with plain pip beside
the megatron-core and transformers that go with it, and goes the whole way with a tiny Llama 3 on a host without an
accelerator. The session fails where a result is not what it should be. Each change of the stack has the results that
would not be there without it.

- *refuses*: an export of the checkpoint with code planted in it ends in an error, and the code hasn't run.
- *layout*: `import_ckpt` writes `release/`, the tracker and Megatron-LM's args; below core 0.19 Megatron Core keeps
  what is not a tensor in `common.pt`. *Loads*: that Megatron Core's `dist_checkpointing` reads every tensor. *Trains*:
  Megatron-LM's own loop starts from it with `--use-checkpoint-args`, and the loss falls within three iterations. The
  wheel of megatron-core has the loop from 0.17 on; for 0.16 a checkout of Megatron-LM at core_v0.16.1 lends it
  (`-- --megatron-lm DIR`).
- *exports*: what was imported comes back, every tensor compared bit for bit.
- *streams*: what was imported tensor by tensor is what an import in memory writes.
- *imports*: the installation by plain pip imports.
- *inspects*: the command is installed and knows the checkpoint.
"""
VERSIONS = ("megatron-bridge", "megatron-core", "transformers", "torch")
CHANGES = {
    "untrusted-checkpoints": {"refuses_code": "refuses"},
    "release-checkpoints": {"writes_release": "layout", "loads_in_core": "loads", "trains": "trains"},
    "conversion-without-cuda": {"exports": "exports"},
    "streaming-import": {"streams": "streams"},
    "requirements": {"imports": "imports"},
    "command-line": {"inspects": "inspects"},
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


def lines_of(text: str) -> list[str]:
    """Returns the lines of the table that `text` has, none if it has another."""
    head = re.escape(_line(HEADER))
    found = re.search(rf"^{head}\n\|[-| ]+\|\n((?:\|.*\n)*)", text, flags=re.MULTILINE)
    return found[1].splitlines() if found else []


def with_section(text: str, section: str) -> str:
    """Returns `text` with the section of `HEADING` in the place of the one that it has, or at its end."""
    kept = re.split(rf"^{HEADING}\n.*?(?=^## |\Z)", text, maxsplit=1, flags=re.MULTILINE | re.DOTALL)
    before, after = kept if len(kept) == 2 else (text, "")
    return f"{before.rstrip()}\n\n{HEADING}\n\n{section.rstrip()}\n" + (f"\n{after}" if after else "")


def main() -> None:
    """Write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help="the folder of check.py's JSON files")
    parser.add_argument("page", type=Path, help="the Markdown file")
    given = parser.parse_args()
    rows = [json.loads(path.read_text("utf-8")) for path in given.rows.glob("*.json")]
    page = given.page.read_text("utf-8") if given.page.is_file() else "# Compatibility\n"
    given.page.write_text(with_section(page, f"{ABOUT}\n{table(rows, lines_of(page))}"), "utf-8")


if __name__ == "__main__":
    main()
