# SPDX-License-Identifier: Apache-2.0
"""What is known of a checkpoint's tensors without their values."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.quantized import UnfitScaleError
from megatron.bridge.models.conversion.stored_tensors import Reads, StoredTensors
from megatron.bridge.models.hf_pretrained.state import DictStateSource, SafeTensorsStateSource, StateDict


TENSORS = {
    "a": torch.arange(20000.0).view(10000, 2),
    "b": torch.arange(20000.0).view(10000, 2),
    "c": torch.zeros(10000, 2),
    "d": torch.zeros(3, dtype=torch.bfloat16),
    "a_scale": torch.ones(1),
}


@pytest.fixture(params=["files", "memory"])
def stored(request, tmp_path):
    if request.param == "memory":
        return StoredTensors(StateDict(DictStateSource(TENSORS)))
    files = {name: f"{name}.safetensors" for name in TENSORS}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return StoredTensors(StateDict(SafeTensorsStateSource(tmp_path)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("e", "'e' is in b.safetensors, and the checkpoint's index doesn't name it: add it there"),
        ("a", "'a' is in a.safetensors and in b.safetensors: keep one of them"),
        ("rotary_emb.inv_freq", None),
    ],
)
def test_index_that_names_something_else_than_the_files(tmp_path, name, words):
    save_file({"a": TENSORS["a"]}, tmp_path / "a.safetensors")
    save_file({"b": TENSORS["b"], name: TENSORS["c"]}, tmp_path / "b.safetensors")
    files = {"a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = StoredTensors(StateDict(SafeTensorsStateSource(tmp_path)))
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        found.check_index()


def test_what_is_stored_is_what_the_index_names(stored):
    stored.check_index()


def test_other_weights_than_config_json_names_are_not_read(stored):
    stored.check_index("model.safetensors.index.json")
    refused = pytest.raises(ValueError, match="names the weights 'other.safetensors'")
    with refused if stored.file("a") else nullcontext():
        stored.check_index("other.safetensors")


def test_shapes_dtypes_and_equal_values(stored):
    assert {name: (each.shape, each.dtype) for name, each in stored.items()} == {
        name: (each.shape, each.dtype) for name, each in TENSORS.items()
    }
    assert all(tensor.is_meta for tensor in stored.values())
    assert stored.equal("a", "b") and not stored.equal("a", "c") and not stored.equal("c", "d")


class Bridge:
    """It dequantizes, with values that are not there."""

    def maybe_modify_loaded_hf_weight(self, source, state):
        names = [source] if isinstance(source, str) else source.values()
        return [
            state[name] * state[f"{name}_scale"].item() if f"{name}_scale" in state else state[name] for name in names
        ]


def test_what_a_bridge_reads(stored):
    reads = Reads(Bridge(), stored)
    assert reads.of("a") == ["a", "a_scale"]
    assert reads.of({"gate": "b", "up": "c"}) == ["b", "c"]
    assert reads.missing == {}
    source = {"gate": "b", "up": "e"}
    assert reads.of(source) == ["b"]
    assert reads.missing == {str(source): "'e'"}


def test_a_scale_that_does_not_fit_is_named(stored):
    class Misfit:
        def maybe_modify_loaded_hf_weight(self, source, state):
            raise UnfitScaleError("a is FP8 of the shape (2, 3)")

    with pytest.raises(UnfitScaleError, match="a is FP8"):
        Reads(Misfit(), stored).of("a")
