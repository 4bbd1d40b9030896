# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face checkpoint: each damage is named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.hf_files import check_weights


INDEX, FIRST, SHARD = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
TENSORS = {
    FIRST: {"a": torch.ones(40, 40)},
    SHARD: {"b": torch.ones(40, 40), "c": torch.ones(3, dtype=torch.bfloat16)},
}


@pytest.fixture
def hf(tmp_path):
    """Two shards and an index."""
    for file, tensors in TENSORS.items():
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in TENSORS.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


# name: (what is done to sound files, error, part of its message)
BROKEN = {
    "shard cut short": (lambda hf: truncate(hf / SHARD, 5000), ValueError, f"{SHARD} is truncated or damaged"),
    "shard empty": (lambda hf: truncate(hf / SHARD, 0), ValueError, f"{SHARD} is truncated or damaged"),
    "tensor missing": (
        lambda hf: rewrite(hf / INDEX, lambda index: index["weight_map"].update({"extra": SHARD})),
        ValueError,
        f"{SHARD} lacks 'extra'",
    ),
    "another set of weights": (
        lambda hf: shutil.copy(hf / SHARD, hf / "model.safetensors"),
        ValueError,
        "two sets of weights, model.safetensors and those of model.safetensors.index.json: remove one",
    ),
    "the same tensors twice, no index": (
        lambda hf: [(hf / INDEX).unlink(), shutil.copy(hf / SHARD, hf / "model.safetensors")],
        ValueError,
        f"twice, in {SHARD} and model.safetensors: remove one of the two sets",
    ),
    "index empty": (lambda hf: (hf / INDEX).write_text("{}"), ValueError, "has no weight_map"),
    "shard outside": (
        lambda hf: rewrite(hf / INDEX, lambda index: index["weight_map"].update({"extra": f"../{SHARD}"})),
        ValueError,
        "expected a file in the same folder",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(hf, name):
    break_it, error, message = BROKEN[name]
    break_it(hf)
    with pytest.raises(error) as caught:
        check_weights(hf)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_tensors_of_sound_files(hf):
    expected = {name: (each.shape, each.dtype) for tensors in TENSORS.values() for name, each in tensors.items()}
    assert {name: (each.shape, each.dtype) for name, each in check_weights(hf).items()} == expected
    (hf / INDEX).unlink()
    assert {name: (each.shape, each.dtype) for name, each in check_weights(hf).items()} == expected
