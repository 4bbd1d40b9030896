# SPDX-License-Identifier: Apache-2.0
"""A model is loaded without reading its weights: its parameters say which bytes of the checkpoint make them."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.host.accelerator import with_process_group
from megatron.bridge.models.conversion.streaming.tensor import is_piecewise


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def release(hf, tmp_path_factory):
    AutoBridge.import_ckpt(hf, root := tmp_path_factory.mktemp("root"))
    return root


@pytest.fixture
def load(hf):
    return with_process_group(AutoBridge.from_hf_pretrained(hf).load_megatron_model)


def test_parameters_of_a_model_are_pieces_of_the_checkpoint(load, hf, release):
    (model,) = load(release, streaming=True)
    assert is_piecewise([model]) and all(parameter.in_files for parameter in model.parameters())
    (other,) = load(release)
    expected = dict(other.named_parameters())
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        name: parameter.shape for name, parameter in expected.items()
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.materialize(), expected[name]), name
    gate = model.decoder.layers[1].mlp.linear_fc1.weight.chunk(2)[0].materialize()
    assert torch.equal(gate, load_file(hf / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"])


def test_a_model_with_another_shape_is_refused(release, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    (release / "release/run_config.yaml").rename(tmp_path / "run_config.yaml")
    try:
        other = AutoBridge.from_hf_pretrained(save_hf_model(tmp_path / "hf", intermediate_size=96))
        load = with_process_group(other.load_megatron_model)
        with pytest.raises(
            ValueError, match=r"linear_fc1.weight in the shape \[2, 256, 64\], the model in \[2, 192, 64\]"
        ):
            load(release / "release", streaming=True)
    finally:
        (tmp_path / "run_config.yaml").rename(release / "release/run_config.yaml")
