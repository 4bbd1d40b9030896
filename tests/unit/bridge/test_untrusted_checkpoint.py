# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is loaded, and code in it is refused in one line and doesn't run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from megatron.bridge.training.untrusted_checkpoint import reading, vet


class Payload:
    """Pickles to a call that leaves a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({"a": torch.zeros(2)}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"iteration": 0}, folder / "common.pt")
    return folder


def test_a_sound_checkpoint_is_loaded(checkpoint: Path):
    with reading(checkpoint):
        assert dist_checkpointing.load_common_state_dict(str(checkpoint)) == {"iteration": 0}
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", [".metadata", "__0.metadata", "common.pt"])
def test_a_payload_does_not_run(checkpoint: Path, tmp_path: Path, name: str):
    trace = tmp_path / "trace"
    if name == "common.pt":
        torch.save({"args": Payload(trace)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(ValueError, match="could run code. Don't load it") as error, reading(checkpoint):
        dist_checkpointing.load_common_state_dict(str(checkpoint))
    assert "\n" not in str(error.value) and not trace.exists()


def test_a_damaged_common_pt_is_named(checkpoint: Path):
    (checkpoint / "common.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="common.pt: the file is not what torch.save writes"), reading(checkpoint):
        dist_checkpointing.load_common_state_dict(str(checkpoint))
    torch.save([1], checkpoint / "common.pt")
    with pytest.raises(ValueError, match="common.pt: it holds a list, expected a dict"), reading(checkpoint):
        dist_checkpointing.load_common_state_dict(str(checkpoint))


def test_a_folder_without_metadata_passes(tmp_path: Path):
    vet(tmp_path)
    vet(tmp_path / "missing")


def test_who_trusts_a_checkpoint_says_so(checkpoint: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"args": Payload(tmp_path / "trace")}, checkpoint / "common.pt")
    with reading(checkpoint):
        dist_checkpointing.load_common_state_dict(str(checkpoint))
    assert (tmp_path / "trace").exists()
