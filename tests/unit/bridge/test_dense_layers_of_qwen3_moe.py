# SPDX-License-Identifier: Apache-2.0
"""Dense layers of a Qwen3-MoE are where its experts aren't, and come back."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge


@pytest.mark.parametrize(
    ("config", "sparse"),
    [
        ({"decoder_sparse_step": 2}, [0, 1]),
        ({"mlp_only_layers": [1]}, [1, 0]),
        ({"mlp_only_layers": [0, 1]}, [0, 0]),
        ({}, 1),
    ],
)
def test_dense_layers_come_back(tmp_path, config, sparse):
    hf = save_hf_model(tmp_path / "hf", "qwen3-moe", **config)
    bridge = AutoBridge.from_hf_pretrained(hf)
    assert bridge.to_megatron_provider(load_weights=False).moe_layer_freq == sparse
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    bridge.export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    expected, found = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
