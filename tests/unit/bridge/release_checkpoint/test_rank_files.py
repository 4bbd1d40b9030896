# SPDX-License-Identifier: Apache-2.0
"""What torch.save wrote is read without torch, and run by nobody."""

import io
import os
import subprocess
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.bridge.release_checkpoint.pickles import RefusedPickle, UnreadablePickle
from megatron.bridge.release_checkpoint.rank_files import SavedFile


def state() -> dict:
    module = torch.nn.Linear(3, 2, bias=False)
    buffer = torch.arange(20, dtype=torch.bfloat16)
    return {
        "args": Namespace(num_layers=2, params_dtype=torch.bfloat16),
        "model": module.state_dict(),
        "parts": OrderedDict(view=buffer[4:16].view(3, 4), empty=torch.empty(0, 3), flag=torch.tensor(True)),
        "parameter": module.weight,
        "_extra_state": io.BytesIO(b"none"),
        "rng_state": [{"np_rng_state": np.random.get_state(), "cuda_rng_state": torch.get_rng_state()}],
    }


def values(stored) -> torch.Tensor:
    data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, stored.dtype)).view(stored.shape)


@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_found_in_the_file(zipped: bool, tmp_path: Path):
    saved = state()
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    file = SavedFile(tmp_path / "file")
    assert file.state["args"].get("num_layers") == 2
    for found, expected in (
        (file.state["model"]["weight"], saved["model"]["weight"]),
        (file.state["parts"]["view"], saved["parts"]["view"]),
        (file.state["parts"]["flag"], saved["parts"]["flag"]),
        (file.state["parameter"], saved["parameter"].detach()),
    ):
        stored = file.tensor(found)
        assert (stored.shape, stored.dtype) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch."))
        assert torch.equal(values(stored), expected)
    assert file.tensor(file.state["parts"]["empty"]).shape == (0, 3)
    assert file.tensor(file.state["_extra_state"]) is None


def test_what_is_not_read(tmp_path: Path):
    path = tmp_path / "file"
    torch.save({"model": torch.randn(4, 3).t()}, path)
    file = SavedFile(path)
    with pytest.raises(UnreadablePickle, match="a tensor is not contiguous"):
        file.tensor(file.state["model"])
    # The pickle has the name that Python 2 had for the module.
    torch.save({"args": subprocess.Popen}, path)
    with pytest.raises(RefusedPickle, match=r"it names commands\.Popen, which no checkpoint needs"):
        SavedFile(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UnreadablePickle, match="the file is not what torch.save writes"):
        SavedFile(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off(zipped: bool, tmp_path: Path):
    path = tmp_path / "file"
    torch.save({"model": torch.randn(100, 100)}, path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(UnreadablePickle):
        file = SavedFile(path)
        file.tensor(file.state["model"])
