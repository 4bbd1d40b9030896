# SPDX-License-Identifier: Apache-2.0
"""Write the table of releases in docs/compatibility.md from the rows that check.py has left.

    python tests/compatibility/table.py dist/compatibility docs/compatibility.md

Only the section `## Releases` is written; what else stands in the file stays.
"""

import argparse
import json
import re
from pathlib import Path


HEADING = "## Releases"
ABOUT = """\
Written by `python3 -m nox -s compatibility`, which builds on each release, installs the wheel with plain pip beside
the megatron-core and transformers that go with it, and goes the whole way with a tiny Llama 3 on a host without an
accelerator. The session fails where a result is not what it should be.

- *release checkpoint*: `import_ckpt` writes `release/`, the tracker and Megatron-LM's args; below core 0.19 Megatron
  Core keeps what is not a tensor in `common.pt`.
- *loads*: that Megatron Core's `dist_checkpointing` reads every tensor.
- *trains*: Megatron-LM's own loop starts from it with `--use-checkpoint-args`, and the loss falls within three
  iterations. The wheel of megatron-core has the loop from 0.17 on; for 0.16 a checkout of Megatron-LM at core_v0.16.1
  lends it (`-- --megatron-lm DIR`).
- *exports*: what was imported comes back, every tensor compared bit for bit.
"""
VERSIONS = ("megatron-bridge", "megatron-core", "transformers", "torch")
STAGES = {
    "imports": "imports",
    "writes_release": "release checkpoint",
    "loads_in_core": "loads",
    "trains": "trains",
    "exports": "exports",
}


def table(rows: list[dict]) -> str:
    """Returns the rows as Markdown, oldest release first; a stage that was not reached is a dash."""
    lines = [[*VERSIONS, *STAGES.values(), "date"]]
    lines.append(["---"] * len(lines[0]))
    for row in sorted(rows, key=lambda row: [int(part) for part in row["versions"]["megatron-bridge"].split(".")]):
        results = [row["results"].get(stage, "–").replace("|", "\\|") for stage in STAGES]
        lines.append([*(row["versions"][package] for package in VERSIONS), *results, row["date"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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
    given.page.write_text(with_section(page, f"{ABOUT}\n{table(rows)}"), "utf-8")


if __name__ == "__main__":
    main()
