# SPDX-License-Identifier: Apache-2.0
"""Import models that have their tensors under other names, as other versions of transformers save them.

    python tests/families/spellings.py FOLDER ARCHITECTURE…

FOLDER gets for each architecture a tiny model as this transformers saves it (`saved`), and with the names that it has
in memory (`in-memory`). If `TRANSFORMERS_4_PYTHON` is a Python whose transformers 4 has the architecture, it makes the
model and saves it (`saved-by-4`). A line of JSON for each says which imports end with an error or other tensors.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import there_and_back
import tiny
import torch
import transformers
from safetensors.torch import save_file

from megatron import bridge
from megatron.bridge.host import stand_ins


SAVE = Path(__file__).with_name("save_with.py")


def spelled(folder: Path, architecture: str) -> dict[str, Path]:
    """Return a tiny model's folders by their spelling."""
    found = {"saved": folder / "saved"}
    source = tiny.make_model(folder / "source", architecture)
    if _save_with_4(source, folder / "saved-by-4"):
        source = found["saved-by-4"] = folder / "saved-by-4"
    model_class = getattr(transformers, architecture.partition(" ")[0])
    model, loaded = model_class.from_pretrained(source, dtype=torch.bfloat16, output_loading_info=True)
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        raise ValueError(f"{source}: transformers finds no {loaded['missing_keys']} {loaded['mismatched_keys']}")
    model.save_pretrained(found["saved"])
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    if len(state) == len(there_and_back.tensors(found["saved"])):  # otherwise experts are one tensor
        found["in-memory"] = folder / "in-memory"
        model.config.save_pretrained(found["in-memory"])
        save_file(state, found["in-memory"] / "model.safetensors", {"format": "pt"})
    return found


def _save_with_4(source: Path, target: Path) -> bool:
    """Let transformers 4 save a model of a config. Return whether there is one that knows it."""
    python = os.environ.get("TRANSFORMERS_4_PYTHON")
    if not python:
        return False
    done = subprocess.run([python, str(SAVE), str(source), str(target)], capture_output=True, text=True)
    if done.returncode and " has no " not in done.stderr.splitlines()[-1]:
        raise RuntimeError(done.stderr[-3000:])
    return not done.returncode


def wrong(folders: dict[str, Path]) -> dict[str, str]:
    """Import each spelling, and return what is wrong by spelling. "" stands for the tensors of the first."""
    releases, found = {}, {}
    for spelling, folder in folders.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                bridge.AutoBridge.import_ckpt(folder, folder / "megatron")
            releases[spelling] = there_and_back.stored(folder / "megatron" / "release")
            found[spelling] = "; ".join(there_and_back.differences(next(iter(releases.values())), releases[spelling]))
        except Exception as error:
            found[spelling] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def main() -> None:
    """Print a line of JSON for each architecture."""
    stand_ins.install()  # before Megatron Core is imported
    folder, *architectures = sys.argv[1:]
    for architecture in architectures:
        folders = spelled(Path(folder, architecture), architecture)
        names = {spelling: sorted(there_and_back.tensors(each))[-1] for spelling, each in folders.items()}
        print(json.dumps({"architecture": architecture, "wrong": wrong(folders), "names": names}), flush=True)


if __name__ == "__main__":
    main()
