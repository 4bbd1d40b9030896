# SPDX-License-Identifier: Apache-2.0
"""Whether models of Transformer Engine's modules load releases that were written without it, family by family.

    python tests/with_transformer_engine/load_families.py [FAMILY…] [--page docs/compatibility.md]

Each family's tiny model is imported in this process, which has no Transformer Engine, as on a user's host. Another
process (`load_release.py`) loads the releases and saves what it loaded; it finds Transformer Engine's Python code in
the folder that `TRANSFORMER_ENGINE` names. Its checkpoints are exported here again. `nox -s transformer_engine`
prepares all that.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
for folder in ("functional", "compatibility"):
    sys.path.append(str(HERE.parent / folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDER_VARIABLE = "TRANSFORMER_ENGINE"
BLOCK = "transformer-engine"
FIGURES = ("modules", "tensors", "extra_states")
HEADER = ("family", "modules of Transformer Engine", "tensors", "extra states", "unused keys", "result")


@dataclasses.dataclass
class Row:
    """What came of a family.

    Attributes:
        family: Its name.
        found: What `load_release.py` printed, by the names of its class `Found`; `error` alone where there is nothing.
        returned: In what exports on this host, of the release and of what the model saved, differ from the source.
    """

    family: str
    found: dict[str, Any]
    returned: list[str] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Say, a line each, what should be otherwise; nothing where all is well."""
        found = self.found
        if found["error"]:
            return [found["error"]]
        if found["lacking"]:
            return [f"the release lacks {len(found['lacking'])} keys: {', '.join(found['lacking'])}"]
        lines = [f"its extra state is not empty: {name}" for name in found["filled_extra_states"]]
        lines += [f"not what Bridge imports where Transformer Engine is: {line}" for line in found["unequal"]]
        lines += [f"not what the Hugging Face model has: {line}" for line in found["lost"]]
        lines += [f"in the release, of no use to a model of either kind: {key}" for key in found["no_copies"]]
        lines += [f"doesn't come back: {line}" for line in self.returned]
        if not all(found[name] for name in FIGURES):
            lines.append("the model has no module of Transformer Engine, no tensor or no extra state")
        return lines

    def cells(self) -> list[str]:
        """Return the row of the table."""
        found = self.found
        result = "loads and comes back, bit for bit" if not self.problems else f"**fails**: {self.problems[0]}"
        figures = [*(found.get(name, 0) for name in FIGURES), len(found.get("besides", ()))]
        return [self.family, *map(str, figures), result.replace("|", "\\|")]


def import_model(folder: Path, family: str) -> Path:
    """Make the family's model in `folder / "hf"`, import it into `folder / "megatron"`, and return `folder`."""
    import release_families

    from megatron.bridge import AutoBridge

    model = release_families.make_model(folder / "hf", family)
    with contextlib.redirect_stdout(io.StringIO()):
        AutoBridge.import_ckpt(model, folder / "megatron")
    return folder


def export_model(folder: Path) -> list[str]:
    """Export both checkpoints of `folder`, and say in which tensors they don't give the Hugging Face model back."""
    from reference import Tensors, differences

    from megatron.bridge import AutoBridge

    lines = []
    bridge = AutoBridge.from_hf_pretrained(folder / "hf")
    for checkpoint, what in {"megatron": "the release", "saved": "what the model saved"}.items():
        back = folder / f"{checkpoint}-back"
        with contextlib.redirect_stdout(io.StringIO()):
            bridge.export_ckpt(folder / checkpoint, back, show_progress=False)
        lines += [f"{line} (exported from {what})" for line in differences(Tensors(folder / "hf"), Tensors(back))]
    return lines


def load(folders: Sequence[Path]) -> list[Row]:
    """Load the releases in `folders`, which have the families' names, in a process with Transformer Engine.

    Returns:
        A row for each; one whose process died before says so.
    """
    path = os.pathsep.join(filter(None, (os.environ[FOLDER_VARIABLE], os.environ.get("PYTHONPATH"))))
    # The process is on its own, whatever launched this one.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "TORCHELASTIC"))}
    done = subprocess.run(
        [sys.executable, str(HERE / "load_release.py"), *map(str, folders)],
        env=own | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    rows = [Row(Path(line.pop("folder")).name, line) for line in lines]
    if any(row.found["error"] for row in rows) or len(rows) < len(folders):
        print(done.stderr[-6000:], file=sys.stderr)
    for row, folder in zip(rows, folders, strict=False):
        if not row.problems:
            try:
                row.returned = export_model(folder)
            except Exception as error:
                traceback.print_exc()
                row.returned = [_first_line(error)]
    died = {"error": f"the process ended with {done.returncode}"}
    return rows + [Row(each.name, died) for each in folders[len(rows) :]]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def table(rows: Iterable[Row], about: str) -> str:
    """Return the rows as Markdown, under a line that says what was tried."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def about() -> str:
    """Say with what the rows were measured, and when."""
    from importlib import metadata

    tried = {name: metadata.version(name).partition("+")[0] for name in ("megatron-bridge", "megatron-core", "torch")}
    engine = next(Path(os.environ[FOLDER_VARIABLE]).glob("transformer_engine-*.dist-info"))
    versions = ", ".join(f"{name} {version}" for name, version in tried.items())
    version = metadata.Distribution.at(engine).version
    return f"Measured on {datetime.now(UTC).date()} with Transformer Engine {version}, {versions}."


def main() -> None:
    """Try the families, print the table, write it, and end with 1 if one fails."""
    import page
    import release_families
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="default: all", metavar="FAMILY")
    parser.add_argument("--page", type=Path, help="the Markdown file to write the table of all families into")
    given = parser.parse_args()
    if unknown := set(given.families) - set(release_families.FAMILIES):
        parser.error(f"found {', '.join(sorted(unknown))}; expected some of {', '.join(release_families.FAMILIES)}")
    if FOLDER_VARIABLE not in os.environ:
        parser.error(f"{FOLDER_VARIABLE} doesn't say where Transformer Engine is: run nox -s transformer_engine")
    # The maintainers of the packages under test read these.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    families = given.families or list(release_families.FAMILIES)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        imported = []
        for family in families:
            try:
                imported.append(import_model(Path(folder, family), family))
            except Exception as error:
                traceback.print_exc()
                rows[family] = Row(family, {"error": f"no release: {_first_line(error)}"})
        rows |= {row.family: row for row in load(imported)}
    ordered = [rows[family] for family in families]
    text = table(ordered, about())
    print(text)
    for row in ordered:
        for problem in row.problems:
            print(f"{row.family}: {problem}")
    if given.page and not given.families:
        given.page.write_text(page.with_block(given.page.read_text("utf-8"), BLOCK, text), "utf-8")
    sys.exit(any(row.problems for row in ordered))


if __name__ == "__main__":
    main()
