# SPDX-License-Identifier: Apache-2.0
"""Test a fork build over one upstream version with its own Megatron Core, on the CPU.

    python tests/compatibility/check.py dist/compatibility/0.6.2.json

Each stage of a row is a step of a user. The error of a stage that fails becomes its result. The row is written as
JSON, from which `table.py` makes the table in docs/compatibility.md.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGES = ("megatron-bridge", "megatron-core", "transformers", "torch")
ITERATIONS = 3


@dataclass
class Row:
    """One upstream version, tested from a Hugging Face model to Megatron-LM and back.

    Attributes:
        folder: The folder for everything that is written.
        megatron_lm: A checkout of Megatron-LM, for a megatron-core whose wheel lacks `megatron.training`.
        results: The result of each stage.
    """

    folder: Path
    megatron_lm: Path | None = None
    results: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """The Hugging Face model."""
        return self.folder / "hf"

    @property
    def checkpoint(self) -> Path:
        """The root of the checkpoint of `import_ckpt`."""
        return self.folder / "megatron"

    def run(self, *stages: Callable[["Row"], str]) -> bool:
        """Run the stages in order until one fails, and return whether all passed."""
        for stage in stages:
            try:
                self.results[stage.__name__] = stage(self)
            except Exception as error:
                traceback.print_exc()
                first = next(iter(str(error).strip().splitlines()), "")
                self.results[stage.__name__] = f"fails: {type(error).__name__}: {first}"
                return False
        return True


def imports(row: Row) -> str:
    """Import Bridge, and make the model for the other stages."""
    import models

    import megatron.bridge  # noqa: F401

    models.make_model(row.model)
    (row.model / "LICENSE").write_text("A license.\n")
    return "yes"


def writes_release(row: Row) -> str:
    """Import the model: a release checkpoint whose args describe it."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args

    AutoBridge.import_ckpt(row.model, row.checkpoint)
    found = {path.name for path in row.checkpoint.iterdir()}
    assert found == {"release", "latest_checkpointed_iteration.txt"}, f"found {found}"
    tracker = (row.checkpoint / "latest_checkpointed_iteration.txt").read_text()
    assert tracker == "release", f"the tracker says {tracker}"
    args = read_megatron_lm_args(row.checkpoint)
    assert args.no_save_optim and args.padded_vocab_size, "the args lack values that Megatron-LM reads"
    assert (row.checkpoint / "release" / "common.pt").is_file(), "common.pt is missing, which core 0.12 to 0.18 needs"
    return "args in `common.pt`"


class Payload:
    """An object whose pickle makes a folder when it is loaded, as it could call anything else."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def refuses_code(row: Row) -> str:
    """Export a copy of the checkpoint whose metadata calls something when PyTorch unpickles it."""
    import torch.distributed.checkpoint as dcp

    from megatron.bridge import AutoBridge

    planted, trace = row.folder / "planted", row.folder / "trace"
    shutil.copytree(row.checkpoint, planted)
    metadata = dcp.FileSystemReader(planted / "release").read_metadata()
    metadata.planner_data = Payload(trace)
    (planted / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    try:
        AutoBridge.from_hf_pretrained(row.model).export_ckpt(planted, row.folder / "from-planted")
    except ValueError as error:
        assert "mkdir" in str(error), f"found another error: {error}"
    else:
        raise AssertionError("the checkpoint was loaded")
    assert not trace.exists(), "the code ran"
    return "code in `.metadata` doesn't run"


def loads_in_core(row: Row) -> str:
    """Load every tensor with Megatron Core's own reader."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with temporary_distributed_context(backend="gloo"):
        loaded = dist_checkpointing.load_plain_tensors(str(row.checkpoint / "release"))
    tensors = [value for value in loaded.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(torch.isfinite(tensor).all() for tensor in tensors), (
        "found no tensors, or values that are not finite"
    )
    return f"{len(tensors)} tensors"


def trains(row: Row) -> str:
    """Fine-tune with Megatron-LM's loop, from megatron-core's wheel or from the checkout."""
    note = ""
    if util.find_spec("megatron.training") is None:
        if row.megatron_lm is None:
            return "not tried: no --megatron-lm"
        # Megatron Core still comes from the wheel, because its helpers are compiled.
        (row.folder / "lm" / "megatron").mkdir(parents=True)
        for package in (row.megatron_lm.resolve() / "megatron").iterdir():
            if package.is_dir() and package.name != "core":
                (row.folder / "lm" / "megatron" / package.name).symlink_to(package)
        os.environ["PYTHONPATH"] = str(row.folder / "lm")
        note = ", loop of a checkout"
    import steps
    from chat import write_conversations

    chats = steps.Chats(
        train=write_conversations(row.folder / "train.jsonl", 64),
        valid=write_conversations(row.folder / "valid.jsonl", 16, seed=2),
        tokenizer=row.model,
    )
    flags = steps.model_flags(row.checkpoint)
    training = steps.train("train", row.folder / "run", chats, load=row.checkpoint, iterations=ITERATIONS, flags=flags)
    losses = training.losses()
    assert list(losses) == list(range(1, ITERATIONS + 1)), f"found losses of {list(losses)}"
    first, last = losses[1], losses[ITERATIONS]
    assert math.isfinite(last) and last < first, f"the loss went from {first} to {last}"
    assert steps.tracker(training.checkpoint) == str(ITERATIONS), "the tracker doesn't name the last iteration"
    return f"loss {first:.3f} → {last:.3f}{note}"


def exports(row: Row) -> str:
    """Export the checkpoint, and compare the weights bit for bit."""
    import torch
    from safetensors.torch import load_file

    from megatron.bridge import AutoBridge

    AutoBridge.from_hf_pretrained(row.model).export_ckpt(row.checkpoint, row.folder / "exported")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (row.model, row.folder / "exported")
    )
    assert before.keys() == after.keys(), f"differs in {sorted(before.keys() ^ after.keys())}"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"differs in {changed}"
    return "bit for bit"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}


def _expect_same(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"differs in {changed}"


def keeps_files(row: Row) -> str:
    """Compare the files that the release checkpoint keeps with those of the model."""
    kept = _files(row.checkpoint / "release" / "hf")
    _expect_same(_files(row.model), kept)
    return f"{len(kept)} files byte for byte"


def gives_files_back(row: Row) -> str:
    """Compare the files of the export, except weights and config, with those of the model."""
    before, after = _files(row.model), _files(row.folder / "exported")
    _expect_same(before | {"config.json": b""}, after | {"config.json": b""})
    return "byte for byte"


def gives_config_back(row: Row) -> str:
    """Compare the config of the export with the model's."""
    before, after = ((folder / "config.json").read_bytes() for folder in (row.model, row.folder / "exported"))
    assert before == after, "config.json differs"
    return "byte for byte"


def streams(row: Row) -> str:
    """Import the model in memory, and check that the earlier import was streamed and wrote the same."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.streaming.plan import plan_import
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    AutoBridge.import_ckpt(row.model, row.folder / "in-memory", streaming=False)
    with temporary_distributed_context(backend="gloo"):
        model = plan_import(AutoBridge.from_hf_pretrained(row.model), row.folder / "streamed")
        assert model is not None, "the model was not streamed"
        streamed, in_memory = (
            dist_checkpointing.load_plain_tensors(str(root / "release"))
            for root in (row.checkpoint, row.folder / "in-memory")
        )
    assert streamed.keys() == in_memory.keys(), f"differs in {sorted(streamed.keys() ^ in_memory.keys())}"
    tensors = [name for name, value in streamed.items() if isinstance(value, torch.Tensor)]
    changed = [name for name in tensors if not torch.equal(streamed[name], in_memory[name])]
    assert not changed, f"differs in {changed}"
    return "the same as an import in memory"


def inspects(row: Row) -> str:
    """Inspect the checkpoint with the command."""
    command = Path(sys.executable).with_name("megatron-bridge")
    done = subprocess.run([command, "inspect", row.checkpoint], capture_output=True, text=True)
    assert done.returncode == 0, (done.stderr.strip() or done.stdout.strip()).partition("\n")[0]
    assert "release" in done.stdout, "the command doesn't recognize a release checkpoint"
    return "`megatron-bridge inspect` recognizes a release checkpoint"


STAGES = (
    imports,
    writes_release,
    refuses_code,
    loads_in_core,
    trains,
    exports,
    keeps_files,
    gives_files_back,
    gives_config_back,
    streams,
    inspects,
)


def main() -> None:
    """Run the row, print it, write it, and exit with 1 if a stage fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the JSON file for the row")
    parser.add_argument(
        "--megatron-lm", type=Path, metavar="DIR", help="a checkout of Megatron-LM, for a core without a loop"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        row = Row(Path(folder), given.megatron_lm)
        passed = row.run(*STAGES)
        private = re.compile(re.escape(folder))
        results = {name: private.sub("…", result) for name, result in row.results.items()}
    versions = {package: metadata.version(package).partition("+")[0] for package in PACKAGES}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).date().isoformat()
    given.out.write_text(
        json.dumps({"date": date, "versions": versions, "results": results}, indent=2) + "\n", "utf-8"
    )
    for name, result in results.items():
        print(f"{name}: {result}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
