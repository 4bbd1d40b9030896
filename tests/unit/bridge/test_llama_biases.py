# SPDX-License-Identifier: Apache-2.0
"""The biases of a Llama are where its weights are, and come back."""

import pytest
import torch
from safetensors.torch import load_file
from test_quantized import rewrite
from tiny_models import save_hf_model, weights

from megatron.bridge import AutoBridge


BOTH = {"attention_bias": True, "mlp_bias": True}


def test_biases_come_back(tmp_path):
    hf = save_hf_model(tmp_path / "hf", **BOTH)
    rewrite(hf, lambda tensors: {name: torch.randn_like(each) for name, each in tensors.items()})
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    biases = [name for name in weights(tmp_path / "out/release") if name.endswith("bias")]
    assert len(biases) == 4
    AutoBridge.from_hf_pretrained(hf).export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    expected, found = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("one", BOTH)
def test_one_kind_of_bias_is_another_model(tmp_path, one):
    hf = save_hf_model(tmp_path / "hf", **{one: True})
    with pytest.raises(ValueError, match=r"config.json of llama: .*_bias is (True|False), Bridge's model has"):
        AutoBridge.import_ckpt(hf, tmp_path / "out")
