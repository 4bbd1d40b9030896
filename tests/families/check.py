# SPDX-License-Identifier: Apache-2.0
"""Take a tiny model of each architecture to Megatron and back, in a process with the stand-ins.

    python tests/families/check.py [ARCHITECTURE…] [--page docs/compatibility.md]

A line of JSON says of each architecture what of its tensors doesn't come back, or why it isn't converted. If
`TRANSFORMER_ENGINE` names the folder with Transformer Engine's own Python code, it also says what is otherwise of the
keys there, and of the tensors of an import in memory. `nox -s families` runs it for all of them, and writes the page.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path


sys.path += [str(Path(__file__).parents[1] / each) for each in ("functional", "compatibility")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from megatron.bridge.host import stand_ins


stand_ins.install()  # before Megatron Core is imported

import page  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: E402

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion.family_results import RESULTS  # noqa: E402


TESTS = Path(__file__).parents[1]
BLOCK = "families"
ENGINE = "TRANSFORMER_ENGINE"


def there_and_back(folder: Path, architecture: str) -> list[str]:
    """Import a tiny model, export it, and return a line for each tensor that differs from the model's."""
    hf = tiny.make_model(folder / "hf", architecture)
    options = {"trust_remote_code": True} if tiny.ROWS[architecture].written else {}
    AutoBridge.import_ckpt(hf, folder / "megatron", **options)
    AutoBridge.from_hf_pretrained(hf, **options).export_ckpt(folder / "megatron", folder / "back", show_progress=False)
    lines = list(differences(tensors(hf), tensors(folder / "back")))
    if ENGINE in os.environ:
        AutoBridge.import_ckpt(hf, folder / "in-memory", streaming=False, **options)
        streamed, in_memory = (stored(folder / each / "release") for each in ("megatron", "in-memory"))
        lines += differences(in_memory, streamed, " (streamed)")
    return lines


def differences(source: dict, back: dict, where: str = "") -> Iterator[str]:
    """Yield a line for each tensor that differs in values or dtype, or that only one side has."""
    for name in sorted(source.keys() | back.keys()):
        if name not in back:
            yield f"{name} is missing{where}"
        elif name not in source:
            yield f"{name} is new{where}"
        elif source[name].dtype != back[name].dtype:
            yield f"{name} is {back[name].dtype}, was {source[name].dtype}{where}"
        elif not source[name].equal(back[name]):
            yield f"{name} has other values{where}"


def tensors(folder: Path) -> dict:
    """Return the tensors of a Hugging Face checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def stored(payload: Path) -> dict:
    """Return the tensors of a release."""
    entries = dcp.FileSystemReader(payload).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, checkpoint_id=payload, no_dist=True)
    return found


def keys(folders: list[Path]) -> dict[str, str]:
    """Return what is wrong with each release for a model of Transformer Engine's own Python code, "" if nothing is."""
    if ENGINE not in os.environ or not folders:
        return {}
    script = TESTS / "with_transformer_engine" / "load_release.py"
    path = os.pathsep.join(filter(None, (os.environ[ENGINE], os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(script), "--keys", *map(str, folders)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    found = {}
    for line in map(json.loads, filter(lambda line: line.startswith('{"folder"'), done.stdout.splitlines())):
        wrong = [f"{len(line[kind])} {kind}, {line[kind][0]}" for kind in ("lacking", "besides") if line[kind]]
        found[Path(line["folder"]).name] = line["error"] or "; ".join(wrong)
    return {folder.name: found.get(folder.name, "the process died") for folder in folders}


def table(rows: dict[str, dict]) -> str:
    """Return the table of all architectures, a word each, with the reasons below it."""
    lines = ["| architecture | comes back | keys of Transformer Engine |", "| --- | --- | --- |"]
    for name in sorted(RESULTS):
        row = rows.get(name)
        back = "untried" if row is None else "exact" if not row["lines"] else "otherwise"
        equal = {None: "untried", "": "equal"}.get(row and row.get("keys"), "otherwise")
        lines.append(f"| {name} | {back} | {equal} |")
    reasons = [f"- {name}: {RESULTS[name]}." for name in sorted(RESULTS) if rows.get(name, {"lines": 1})["lines"] != 0]
    return "\n".join([*lines, "", *reasons])


def main() -> None:
    """Print a line of JSON for each architecture, and exit with 1 if one has another result than its row says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*", help="default: all", metavar="ARCHITECTURE")
    parser.add_argument("--page", type=Path, help="write the table to this Markdown file, if all are tried")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in given.architectures or tiny.ROWS:
            expected = tiny.ROWS[architecture].reason
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    lines = there_and_back(Path(folder, architecture), architecture)
                except Exception as error:
                    lines = [" ".join(f"{type(error).__name__}: {error}".split())]
            row = {"architecture": architecture, "lines": len(lines), "first": lines[0] if lines else ""}
            row["as expected"] = expected in row["first"] if expected else not lines
            rows[architecture] = row
            print(json.dumps(row), flush=True)
        released = [Path(folder, name) for name in rows if Path(folder, name, "megatron", "release").is_dir()]
        for name, wrong in keys(released).items():
            rows[name] |= {"keys": wrong, "as expected": rows[name]["as expected"] and not wrong}
            print(json.dumps({"architecture": name, "keys": wrong}), flush=True)
    if given.page and not given.architectures:
        given.page.write_text(page.with_block(given.page.read_text("utf-8"), BLOCK, table(rows)), "utf-8")
    sys.exit(not all(row["as expected"] for row in rows.values()))


if __name__ == "__main__":
    main()
