# SPDX-License-Identifier: Apache-2.0
"""Take a tiny model of each architecture to Megatron and back, several at a time, and write the table of the page.

    python tests/families/check.py [ARCHITECTURE…] [--rows dist/families.jsonl] [--page docs/compatibility.md]

A line of JSON says of each architecture what of its tensors doesn't come back, or why it isn't converted. If
`TRANSFORMER_ENGINE` names the folder with Transformer Engine's own Python code, it also says what is otherwise of the
keys there, and of the tensors of an import and an export in memory.

A run that was stopped goes on: --rows has the lines, and those of another build or of another tiny model don't count.
The page is written when there is a line for every architecture. `nox -s families` sets everything up.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path


sys.path += [str(Path(__file__).parents[1] / each) for each in ("functional", "compatibility")]

import page
import tiny

from megatron.bridge.models.conversion.family_results import RESULTS
from megatron.bridge.models.conversion.layout_families import needs_layout


BLOCK = "families"
ENGINE = "TRANSFORMER_ENGINE"
# Architectures that one process takes one after the other. Its start takes as long as two of them.
BATCH = 6
WITH = " with "


def fingerprint(architecture: str) -> str:
    """Return what a line of --rows must have to count: a hash of the installed package and of the tiny model."""
    package = importlib.metadata.distribution("megatron-bridge").read_text("RECORD")
    return hashlib.sha256(f"{package}{tiny.ROWS[architecture]}".encode()).hexdigest()


def known(path: Path) -> dict[str, dict]:
    """Return the rows of this build that an earlier run wrote."""
    lines = map(json.loads, path.read_text("utf-8").splitlines()) if path.is_file() else ()
    rows = {row["architecture"]: row for row in lines if row["architecture"] in tiny.ROWS}
    return {name: row for name, row in rows.items() if row["of"] == fingerprint(name) and is_done(row)}


def is_done(row: dict) -> bool:
    """Return whether a row needs no other try: it says what is expected, and all that this run would say."""
    return row["as expected"] and ("keys" in row or not row["converts"] or ENGINE not in os.environ)


def batches(architectures: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yield what a process takes. One has the stand-ins or not, as on the host of a user."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for each in architectures:
        kinds[needs_layout(tiny.config(each))].append(each)
    for kind in kinds.values():
        yield from itertools.batched(kind, BATCH)


def run(architectures: tuple[str, ...]) -> list[dict]:
    """Return the rows of some architectures, which a process of their own has tried."""
    command = [sys.executable, str(Path(__file__).with_name("there_and_back.py")), *architectures]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"architecture"')]
    died = {"converts": False, "lines": ["the process died"], "keys": "the process died", "as expected": False}
    for name in {*architectures} - {row["architecture"] for row in found}:
        found.append({"architecture": name} | died)
    for row in found:
        row["as expected"] &= agrees(row)
    return found


def agrees(row: dict) -> bool:
    """Return whether `megatron-bridge families` says what a row says. It has no line for a variant."""
    name = row["architecture"]
    return WITH in name or RESULTS[name].startswith("bit for bit") == (not row["lines"])


def words(row: dict | None) -> tuple[str, str]:
    """Return what a row has in the table: whether the tensors come back, and the keys."""
    if row is None:
        return "untried", "untried"
    back = "exact" if not row["lines"] else "otherwise" if row["converts"] else "refused"
    if "keys" not in row:
        return back, "untried" if row["converts"] else ""
    return back, "otherwise" if row["keys"] else "more" if row["copies"] else "equal"


def table(rows: dict[str, dict]) -> str:
    """Return the table of all architectures, a word each, with the reasons below it."""
    variants = [name for name in rows if WITH in name]
    lines = ["| architecture | comes back | keys |", "| --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(words(rows.get(name)))} |" for name in sorted(RESULTS)]
    lines += [""]
    for name in sorted([*RESULTS, *variants]):
        back, keys = words(rows.get(name))
        if name in variants:
            reason = tiny.ROWS[name].reason
            lines.append(
                f"- {name}: {back}" + (f", keys {keys}" if keys else "") + (f": {reason}." if reason else ".")
            )
        elif back != "exact":
            lines.append(f"- {name}: {RESULTS[name]}.")
    return "\n".join(lines)


def about() -> str:
    """Return a line with the date and the versions of the measurement."""
    tried = {name: importlib.metadata.version(name).partition("+")[0] for name in ("megatron-bridge", "megatron-core")}
    engine = next(Path(os.environ[ENGINE]).glob("transformer_engine-*.dist-info"))
    tried["Transformer Engine"] = importlib.metadata.Distribution.at(engine).version
    versions = ", ".join(f"{name} {version}" for name, version in tried.items())
    return f"Measured on {datetime.now(UTC).date()} with one build: {versions}."


def main() -> None:
    """Print a line of JSON for each architecture, and exit with 1 if one has another result than its row says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*", help="default: those without a line", metavar="ARCHITECTURE")
    parser.add_argument("--rows", type=Path, default=Path("dist", "families.jsonl"), help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="write the table to this Markdown file, if all are tried")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of 2 GB each; default: %(default)s")
    given = parser.parse_args()
    if unknown := set(given.architectures) - tiny.ROWS.keys():
        parser.error(f"found {', '.join(sorted(unknown))}; expected some of {', '.join(tiny.ROWS)}")
    rows = known(given.rows)
    wanted = given.architectures or [each for each in tiny.ROWS if each not in rows]
    given.rows.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool, given.rows.open("a", encoding="utf-8") as file:
        for row in itertools.chain.from_iterable(pool.map(run, batches(wanted))):
            name = row["architecture"]
            rows[name] = row
            print(json.dumps(row), flush=True)
            print(json.dumps(row | {"of": fingerprint(name)}), file=file, flush=True)
    if given.page and ENGINE in os.environ and rows.keys() == tiny.ROWS.keys():
        text = f"{about()}\n\n{table(rows)}"
        given.page.write_text(page.with_block(given.page.read_text("utf-8"), BLOCK, text), "utf-8")
    sys.exit(not all(row["as expected"] for row in rows.values()))


if __name__ == "__main__":
    main()
