# SPDX-License-Identifier: Apache-2.0
"""Two processes write what one process writes, with every option of the command that changes what is written."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from checkpoints import AutoBridge, digest, run, save_hf_model


pytestmark = pytest.mark.two_processes

PROGRAMS = Path(sys.executable).parent
# What starts two ranks.
TWO = {
    "--processes": lambda arguments: [PROGRAMS / "megatron-bridge", *arguments, "--processes=2"],
    "torchrun": lambda arguments: [
        *(PROGRAMS / "torchrun", "--standalone", "--nproc-per-node=2", "--no-python"),
        *(PROGRAMS / "megatron-bridge", *arguments),
    ],
}
# What is converted, {out} last but for options, and what starts the ranks.
ROWS = {
    "an adapter": ("import {hf} {out} --adapter {adapter}", "--processes"),
    "a proof": ("import {hf} {out} --verify --json", "--processes"),
    "a checkpoint of Megatron-LM": ("import --from-megatron {release} {out}", "--processes"),
    "a checkpoint of Megatron-LM, under torchrun": ("import --from-megatron {release} {out}", "torchrun"),
    "a family with stand-ins": ("import {gemma} {out}", "--processes"),
    "an export of that": ("export {gemma_release} {out}", "torchrun"),
    "trained adapters, merged": ("export {trained} {out} --hf-model {hf}", "--processes"),
    "trained adapters, merged, under torchrun": ("export {trained} {out} --hf-model {hf}", "torchrun"),
    "trained adapters alone": ("export {trained} {out} --hf-model {hf} --adapter-only", "torchrun"),
    "shards, quietly": ("export {release} {out} --max-shard-size 100KB --quiet", "--processes"),
}


def make(folder: Path) -> None:
    # In a child, for others have scripts of these names, too.
    sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("families", "functional")]
    import tiny
    from peft import LoraConfig
    from test_adapter import train
    from test_trained_adapter import LoRA, save_adapters

    hf = save_hf_model(folder / "hf")
    train(hf, folder / "adapter", config=LoraConfig, target_modules=["q_proj", "v_proj"], r=4)
    AutoBridge.import_ckpt(hf, folder / "release")
    save_adapters(hf, folder / "release", folder / "trained", LoRA(dim=4))
    tiny.make_model(folder / "gemma", "Gemma2ForCausalLM")
    AutoBridge.import_ckpt(folder / "gemma", folder / "gemma_release")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    seen = run(partial(make, folder))
    assert "error" not in seen, seen
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ROWS)
def test_two_processes_write_what_one_writes(made, tmp_path, name):
    row, launcher = ROWS[name]
    said = {}
    for ranks, command in (
        ("one", lambda arguments: [PROGRAMS / "megatron-bridge", *arguments]),
        ("two", TWO[launcher]),
    ):
        arguments = row.format(**made, out=tmp_path / ranks).split()
        done = subprocess.run(
            command(arguments), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said[ranks] = done.stdout.replace(str(tmp_path / ranks), "OUT")
    assert said["one"].count("Wrote") == said["two"].count("Wrote") == (not {"--json", "--quiet"} & set(row.split()))
    one, two = tmp_path / "one", tmp_path / "two"
    if row.startswith("import"):
        seen = [run(partial(digest, root))["result"] for root in (one, two)]
        assert seen[0] is not None and seen[0] == seen[1]
        assert len(list(one.glob("release/*.distcp"))) == 1 and len(list(two.glob("release/*.distcp"))) == 2
    else:
        files = {path.name: path.read_bytes() for path in one.iterdir()}
        assert files == {path.name: path.read_bytes() for path in two.iterdir()}
