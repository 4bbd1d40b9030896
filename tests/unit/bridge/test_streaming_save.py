# SPDX-License-Identifier: Apache-2.0
"""A save of piecewise tensors writes what other saves write, and they don't depend on it."""

import io
import zipfile
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.streaming import dcp
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.training import checkpointing


@pytest.mark.parametrize("tensor", [torch.arange(10), torch.tensor(3.0), torch.empty(0, 5), torch.ones(2, 3).bool()])
def test_an_archive_is_what_torch_saves(tensor):
    saved, written = io.BytesIO(), io.BytesIO()
    torch.save(tensor, saved)
    assert dcp.write_tensor(written, PiecewiseTensor.wrap(tensor), lambda written: None)
    assert records(written) == records(saved)


def records(file):
    """Return where each record of an archive lies, and what it holds, but for the one that is a sum of all sums."""
    with zipfile.ZipFile(file) as archive:
        return [
            (entry.filename, entry.header_offset, entry.filename.endswith("serialization_id") or archive.read(entry))
            for entry in archive.infolist()
        ]


def test_other_saves_do_not_depend_on_this_one():
    """It imports private names of torch and Megatron Core, which may be gone in the next release."""
    assert not {id(dcp), id(dcp.StreamingSaveStrategy)} & {id(value) for value in vars(checkpointing).values()}


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    source = save_hf_model(tmp_path / "hf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="GB left, expected at least"):
        AutoBridge.import_ckpt(source, tmp_path / "out")
    assert not (tmp_path / "out/release").exists()
