# SPDX-License-Identifier: Apache-2.0
"""What payloads of torch, torch_dcp and fsdp_dtensor hold beside values."""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from rank_checkpoints import args_of, save_ranks, whole_model

from megatron.bridge.release_checkpoint.metadata import read_metadata
from megatron.bridge.release_checkpoint.other_formats import read_entries, read_ranks


def test_the_files_of_ranks(tmp_path: Path):
    damage: list[str] = []
    found = read_ranks(save_ranks(tmp_path, whole_model(), args_of()), damage)
    assert (found["format"], damage) == ("torch", [])
    assert found["forms"]["model_optim_rng.pt"].state["args"].get("hidden_size") == 8
    assert found["metadata"].tensors["output_layer.weight"] == ((16, 8), "float32")
    (tmp_path / "mp_rank_00" / "model_optim_rng.pt").unlink()
    assert "metadata" not in read_ranks(tmp_path, damage)
    assert damage[0].startswith(f"{tmp_path}: no folder of a rank has a model_optim_rng.pt")


@pytest.mark.parametrize("halves", [False, True])
def test_entries(halves: bool, tmp_path: Path):
    entries = {f"model.{name}": weight for name, weight in whole_model().items()}
    if halves:
        entries["model.decoder.layers.0.mlp.linear_fc1.weight_w"] = whole_model()["output_layer.weight"]
    entries |= {"args": args_of(), "iteration": 3}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    damage: list[str] = []
    found = read_entries(tmp_path, read_metadata(tmp_path / ".metadata"), damage)
    assert (found["format"], damage) == ("fsdp_dtensor" if halves else "torch_dcp", [])
    state = found["forms"]["entries"].state
    assert (state["iteration"], state["args"].get("hidden_size")) == (3, 8)
