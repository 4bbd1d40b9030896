# SPDX-License-Identifier: Apache-2.0
"""Load release checkpoints that were written without Transformer Engine into models of its modules, by family.

    python tests/with_transformer_engine/load_families.py [FAMILY…] [--page docs/compatibility.md]

This process has no Transformer Engine, like a user's host. It imports a tiny model of each family. Another process
(`load_release.py`) loads the release checkpoints and saves the models. It finds Transformer Engine's Python code in
the folder that `TRANSFORMER_ENGINE` names. This process exports the saved checkpoints. `nox -s families`
sets everything up.
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
    """The result of a family.

    Attributes:
        family: The family.
        found: The output of `load_release.py`, by the names of its class `Found`, or only `error`.
        returned: The differences between the source and exports on this host, of both checkpoints.
    """

    family: str
    found: dict[str, Any]
    returned: list[str] = dataclasses.field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Return a line for each problem."""
        found = self.found
        if found["error"]:
            return [found["error"]]
        if found["lacking"]:
            return [f"the release checkpoint lacks {len(found['lacking'])} keys: {', '.join(found['lacking'])}"]
        lines = [f"extra state that is not empty: {name}" for name in found["filled_extra_states"]]
        lines += [f"differs from Bridge's import with Transformer Engine: {line}" for line in found["unequal"]]
        lines += [f"differs from the Hugging Face model: {line}" for line in found["lost"]]
        lines += [f"unused key of the release checkpoint that is not a copy: {key}" for key in found["no_copies"]]
        lines += [f"doesn't come back: {line}" for line in self.returned]
        if not all(found[name] for name in FIGURES):
            lines.append("the model has no module of Transformer Engine, no tensor, or no extra state")
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
    """Export both checkpoints of `folder`, and return the differences from the Hugging Face model."""
    from reference import Tensors, differences

    from megatron.bridge import AutoBridge

    lines = []
    bridge = AutoBridge.from_hf_pretrained(folder / "hf")
    for checkpoint, what in {"megatron": "the release checkpoint", "saved": "what the model saved"}.items():
        back = folder / f"{checkpoint}-back"
        with contextlib.redirect_stdout(io.StringIO()):
            bridge.export_ckpt(folder / checkpoint, back, show_progress=False)
        lines += [f"{line} (exported from {what})" for line in differences(Tensors(folder / "hf"), Tensors(back))]
    return lines


def load(folders: Sequence[Path]) -> list[Row]:
    """Load the release checkpoints in `folders`, named like the families, in a process with Transformer Engine.

    Returns:
        A row for each. If the process died before, the row says so.
    """
    path = os.pathsep.join(filter(None, (os.environ[FOLDER_VARIABLE], os.environ.get("PYTHONPATH"))))
    # The new process must not see the variables of a launcher of this one.
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
    """Return the rows as Markdown, below the line `about`."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def about() -> str:
    """Return a line with the date and the versions of the measurement."""
    from importlib import metadata

    tried = {name: metadata.version(name).partition("+")[0] for name in ("megatron-bridge", "megatron-core", "torch")}
    engine = next(Path(os.environ[FOLDER_VARIABLE]).glob("transformer_engine-*.dist-info"))
    versions = ", ".join(f"{name} {version}" for name, version in tried.items())
    version = metadata.Distribution.at(engine).version
    return f"Measured on {datetime.now(UTC).date()} with Transformer Engine {version}, {versions}."


def main() -> None:
    """Test the families, print the table, write it, and exit with 1 if one fails."""
    import page
    import release_families
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", help="default: all", metavar="FAMILY")
    parser.add_argument("--page", type=Path, help="write the table to this Markdown file, if all families are tested")
    given = parser.parse_args()
    if unknown := set(given.families) - set(release_families.FAMILIES):
        parser.error(f"found {', '.join(sorted(unknown))}; expected some of {', '.join(release_families.FAMILIES)}")
    if FOLDER_VARIABLE not in os.environ:
        parser.error(f"{FOLDER_VARIABLE} is not set to the folder of Transformer Engine: run nox -s families")
    # These warnings are for the maintainers of the packages.
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
                rows[family] = Row(family, {"error": f"the import failed: {_first_line(error)}"})
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
