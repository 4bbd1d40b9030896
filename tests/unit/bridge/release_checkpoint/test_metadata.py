# SPDX-License-Identifier: Apache-2.0
"""What PyTorch and Megatron Core write is read without torch, and what makes no sense is refused."""

import argparse
import pickle
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron.bridge.release_checkpoint import metadata
from megatron.bridge.release_checkpoint.metadata import StoredTensor, read_common_state, read_metadata
from megatron.bridge.release_checkpoint.pickles import Inert, UnreadablePickle


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of PyTorch's writer: two tensors and an object."""
    folder = tmp_path / "checkpoint"
    state = {"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16), "common_state/shard_0_1": [{"x": 1}]}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    return folder


def test_metadata_is_read(checkpoint: Path):
    metadata = read_metadata(checkpoint / ".metadata")
    assert metadata.tensors == {"a": ((2, 3), "float32"), "b.c": ((4,), "bfloat16")}
    assert metadata.objects == ("common_state/shard_0_1",)
    shard = next(each for each in metadata.shards if each.entry == "common_state/shard_0_1")
    assert read_common_state(checkpoint / shard.file, shard.offset, shard.length) == [{"x": 1}]
    assert {each.file for each in metadata.shards} <= {path.name for path in checkpoint.iterdir()}


def test_common_state_is_read_without_making_its_classes(tmp_path: Path):
    state = {
        "args": argparse.Namespace(num_layers=4, dtype=torch.bfloat16, exit_signal=signal.SIGTERM, path=Path("a/b")),
        "more": types.SimpleNamespace(deep=[1.5, None, (True,)]),
        "weight": torch.zeros(3, 4, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
    }
    torch.save(state, tmp_path / "common.pt")
    read = read_common_state(tmp_path / "common.pt")
    assert read["args"].get("num_layers") == 4
    assert read["args"].get("missing") is None
    assert isinstance(read["args"].get("exit_signal"), Inert)
    assert read["more"].state == {"deep": [1.5, None, (True,)]}
    assert isinstance(read["weight"], StoredTensor)
    assert (read["weight"].shape, read["weight"].dtype) == ((3, 4), "float16")


def _with(checkpoint: Path, change) -> Path:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata, next(iter(metadata.storage_data.values())))
    path.write_bytes(pickle.dumps(metadata))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata, info: setattr(info, "offset", -1),
        lambda metadata, info: setattr(info, "length", -1),
        lambda metadata, info: setattr(info, "offset", 1 << 70),
        lambda metadata, info: setattr(info, "offset", "0"),
        lambda metadata, info: setattr(info, "relative_path", "../../secret"),
        lambda metadata, info: setattr(info, "relative_path", "/etc/passwd"),
        lambda metadata, info: setattr(info, "relative_path", "a\0b"),
        lambda metadata, info: setattr(info, "relative_path", 7),
        lambda metadata, info: setattr(metadata, "storage_data", [1]),
        lambda metadata, info: setattr(metadata, "storage_data", None),
        lambda metadata, info: setattr(metadata, "state_dict_metadata", {"a": 1}),
        lambda metadata, info: setattr(metadata.state_dict_metadata["a"], "size", (-1, 2)),
        lambda metadata, info: setattr(metadata.state_dict_metadata["a"].properties, "dtype", "float32"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(checkpoint: Path, change):
    path = _with(checkpoint, change)
    with pytest.raises(UnreadablePickle) as error:
        read_metadata(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_needs_neither_torch_nor_bridge():
    code = (
        "import sys, types; sys.modules['megatron.bridge'] = bridge = types.ModuleType('megatron.bridge');"
        "bridge.__path__ = sys.argv[1:]; import megatron.bridge.release_checkpoint.metadata;"
        "print([name for name in ('torch', 'numpy', 'megatron.core') if name in sys.modules])"
    )
    bridge = str(Path(metadata.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, bridge], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
