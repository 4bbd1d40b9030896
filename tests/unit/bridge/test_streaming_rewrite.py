# SPDX-License-Identifier: Apache-2.0
"""Weights of an export in another dtype, and in files of another size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.bridge.models.conversion.hf_files import INDEX
from megatron.bridge.models.conversion.streaming.rewrite import rewrite


TENSORS = {"a": torch.arange(64.0).bfloat16(), "b": torch.full((8, 8), 0.5).bfloat16(), "ids": torch.arange(3)}


def export(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(TENSORS | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_floats_are_cast_and_the_config_says_it(tmp_path: Path):
    rewrite(folder := export(tmp_path / "hf"), torch.float32, None)
    found = weights(folder)
    assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in TENSORS.items())
    assert (found["a"].dtype, found["ids"].dtype) == (torch.float32, torch.int64)
    assert json.loads((folder / "config.json").read_text()) == {"torch_dtype": "float32"}
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}


def test_files_are_divided(tmp_path: Path):
    rewrite(folder := export(tmp_path / "hf"), None, 200)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 2 and {path.name for path in folder.glob("*.safetensors")} == set(
        index.values()
    )
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in TENSORS.items())
    rewrite(folder, None, "1GB")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}


def test_what_a_dtype_can_not_hold_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="large holds 1.*e.30 as torch.bfloat16, torch.float16 goes up to 65504"):
        rewrite(export(tmp_path / "1", large=torch.tensor([1e30]).bfloat16()), torch.float16, None)
    with pytest.raises(ValueError, match="quantized is quantized .*pass no dtype"):
        rewrite(export(tmp_path / "2", quantized=torch.ones(8).to(torch.float8_e4m3fn)), torch.float32, None)
