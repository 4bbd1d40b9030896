# SPDX-License-Identifier: Apache-2.0
"""Payloads in Megatron-LM's other formats are examined, and judged."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_checkpoints import args_of, save_ranks, whole_model

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.verdicts import launch_flags, verdicts
from megatron.bridge.repair.problems import problems


def root(path: Path, tracker: str = "release") -> Path:
    path.mkdir(exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text(tracker)
    return path / ("release" if tracker == "release" else f"iter_{int(tracker):07d}")


def judged(path: Path) -> set[tuple[str, str]]:
    return {(each.loads, each.why) for each in verdicts(examine(path)) if "core 0.1" in each.reader}


def test_the_files_of_ranks(tmp_path: Path):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    folder = save_ranks(root(tmp_path), whole_model(), args_of(**sizes))
    for path in (tmp_path, folder, folder.parent / "release"):
        found = examine(path)
        payload = found.payload
        assert (payload.format, payload.core, payload.damage, problems(found)) == ("torch", None, [], [])
        assert (payload.args.num_layers, payload.parallelism) == (4, {"TP": 2, "PP": 2, "EP": 1})
        assert payload.parameters == sum(weight.numel() for weight in whole_model().values())
        assert (payload.dtypes, payload.iteration, payload.version) == (["float32"], 0, 3.0)
    flags = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert judged(tmp_path) == {("partly", f"only split as it was saved: {' '.join(flags)}")}
    assert all(set(flags) < set(words) for words in launch_flags(found).values())


def test_a_training_of_one_rank_resumes(tmp_path: Path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"params": [0]}]}
    save_ranks(root(tmp_path, "7"), whole_model(), args_of(), optimizer=optimizer, iteration=7)
    assert judged(tmp_path) == {("yes", "resumes at 7")}
    assert examine(tmp_path).layout == "training"


def test_files_that_are_missing_damaged_or_of_another_model(tmp_path: Path):
    folder = save_ranks(root(tmp_path / "a"), whole_model(), args_of(tensor_model_parallel_size=2))
    file = folder / "mp_rank_01" / "model_optim_rng.pt"
    file.unlink()
    assert examine(folder).payload.damage == ["mp_rank_01/model_optim_rng.pt is missing"]
    file.write_bytes(b"nothing")
    assert examine(folder).payload.damage[0].startswith(f"{file}: the file is not what torch.save writes")
    save_ranks(root(tmp_path / "b"), whole_model(layers=2), args_of(layers=4))
    found = examine(tmp_path / "b")
    assert [each.what for each in problems(found)] == [
        "The args are those of another model: num_layers is 4 by the args and 2 in the weights"
    ]
    assert {each.loads for each in verdicts(found)[:-1]} == {"no"}


@pytest.mark.parametrize(
    ("written", "flag"), [("torch_dcp", "--use-torch-fsdp2"), ("fsdp_dtensor", "--use-megatron-fsdp")]
)
def test_a_state_in_entries_of_its_own(written: str, flag: str, tmp_path: Path):
    entries = {f"model.{name}": weight for name, weight in whole_model().items()}
    entries |= {"args": args_of(ckpt_format=written), "iteration": 0, "checkpoint_version": 3.0}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(root(tmp_path)), no_dist=True)
    payload = examine(tmp_path).payload
    assert (payload.format, payload.damage, payload.args.hidden_size) == (written, [], 8)
    assert payload.parameters == sum(weight.numel() for weight in whole_model().values())
    found = {each.reader: (each.loads, each.why) for each in verdicts(examine(tmp_path))}
    only = ("partly", f"only split as it was saved: --ckpt-format {written} {flag}")
    assert found["Megatron-LM, core 0.19"] == only
    is_known = written == "torch_dcp"
    old = only if is_known else ("no", "doesn't know the format fsdp_dtensor (_get_checkpoint_format)")
    assert found["Megatron-LM, core 0.13"] == old
    assert found["Megatron-Bridge"][0] == ("partly" if is_known else "no")
