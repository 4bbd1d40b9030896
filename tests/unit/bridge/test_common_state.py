# SPDX-License-Identifier: Apache-2.0
"""Both forms of the common state hold the same."""

import pickle
from argparse import Namespace

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.bridge.training.common_state import write_common_pt


STATE = {"args": Namespace(num_layers=2), "iteration": 0, "checkpoint_version": 3.0}


@pytest.mark.parametrize("has_file", [False, True])
def test_the_file_is_written_from_the_entry_unless_it_is_there(tmp_path, monkeypatch, has_file):
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda path: STATE)
    if has_file:
        torch.save("of the core", tmp_path / "common.pt")
    write_common_pt(tmp_path)
    # megatron.core allows Namespace; with safe_globals, the tests after this one would find it taken back
    found = torch.load(tmp_path / "common.pt", weights_only=True)
    assert found == ("of the core" if has_file else STATE)


def test_metadata_is_written_without_strides_for_earlier_versions_of_pytorch(tmp_path, monkeypatch):
    properties, state_of = TensorProperties(torch.float32), TensorProperties.__getstate__
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = TensorStorageMetadata(properties, torch.Size([2]), [chunk])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": tensor})))
    torch.save(STATE, tmp_path / "common.pt")
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*state_of(self)[:5], (1,)))
    write_common_pt(tmp_path)
    monkeypatch.setattr(TensorProperties, "__setstate__", lambda self, state: self.__dict__.update(found=state))
    (found,) = pickle.loads((tmp_path / ".metadata").read_bytes()).state_dict_metadata.values()
    assert found.properties.found == state_of(properties)[:5]
    assert found.chunks == [chunk]
