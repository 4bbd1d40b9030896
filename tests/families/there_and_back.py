# SPDX-License-Identifier: Apache-2.0
"""Take tiny models to Megatron and back, in one process, which has the stand-ins if one of them needs these.

    python tests/families/there_and_back.py ARCHITECTURE…

`check.py` says what a line of the output is, and runs several such processes at a time.
"""

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
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MEGATRON_BRIDGE_IN_PROOF": "1"}

import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron import bridge
from megatron.bridge.host import stand_ins
from megatron.bridge.models.conversion.layout_families import needs_layout


TESTS = Path(__file__).parents[1]
ENGINE = "TRANSFORMER_ENGINE"


def there_and_back(folder: Path, architecture: str) -> list[str]:
    """Import a tiny model, export it, and return a line for each tensor that differs from the model's."""
    hf = tiny.make_model(folder / "hf", architecture)
    options = {"trust_remote_code": True} if tiny.ROWS[architecture].written else {}
    bridge.AutoBridge.import_ckpt(hf, folder / "megatron", **options)
    export = bridge.AutoBridge.from_hf_pretrained(hf, **options).export_ckpt
    export(folder / "megatron", folder / "back", show_progress=False)
    lines = list(differences(tensors(hf), tensors(folder / "back")))
    if ENGINE in os.environ:
        bridge.AutoBridge.import_ckpt(hf, folder / "in-memory", streaming=False, **options)
        streamed, in_memory = (stored(folder / each / "release") for each in ("megatron", "in-memory"))
        lines += differences(in_memory, streamed, " (streamed import)")
        export(folder / "megatron", folder / "back-in-memory", show_progress=False, streaming=False)
        exported = (tensors(folder / each) for each in ("back-in-memory", "back"))
        lines += differences(*exported, " (streamed export)")
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


def keys(folders: list[Path]) -> dict[str, dict]:
    """Return what is wrong with each release for a model of Transformer Engine's own Python code, "" if nothing is.

    With it come the number of keys that the model doesn't ask for, and that are copies of tensors under others. A
    release made of Megatron Core's own layers may have some.
    """
    if ENGINE not in os.environ or not folders:
        return {}
    script = TESTS / "with_transformer_engine" / "load_release.py"
    path = os.pathsep.join(filter(None, (os.environ[ENGINE], os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(script), "--keys", *map(str, folders)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    found = {folder.name: {"keys": "the process died", "copies": 0} for folder in folders}
    for line in map(json.loads, filter(lambda line: line.startswith('{"folder"'), done.stdout.splitlines())):
        unwanted = line["besides"] if stand_ins.are_installed() else line["no_copies"]
        wrong = {"lacking": line["lacking"], "besides": unwanted}
        texts = [f"{len(names)} {kind}, {names[0]}" for kind, names in wrong.items() if names]
        copies = len(line["besides"]) - len(line["no_copies"])
        found[Path(line["folder"]).name] = {"keys": line["error"] or "; ".join(texts), "copies": copies}
    return found


def main() -> None:
    """Print a line of JSON for each architecture."""
    names = sys.argv[1:]
    if any(needs_layout(tiny.config(name)) for name in names):
        stand_ins.install()  # before Megatron Core is imported
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            expected = tiny.ROWS[name].reason
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    converts, lines = True, there_and_back(Path(folder, name), name)
                except Exception as error:
                    converts, lines = False, [" ".join(f"{type(error).__name__}: {error}".split())]
            as_expected = expected in lines[0] if expected and lines else not expected and not lines
            rows[name] = {"architecture": name, "converts": converts, "lines": lines[:3], "as expected": as_expected}
        released = [Path(folder, name) for name in rows if Path(folder, name, "megatron", "release").is_dir()]
        for name, found in keys(released).items():
            rows[name] |= found | {"as expected": rows[name]["as expected"] and not found["keys"]}
    for row in rows.values():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
