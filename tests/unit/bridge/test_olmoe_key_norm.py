# SPDX-License-Identifier: Apache-2.0
"""An OLMoE with fewer key and value heads than query heads goes out and back."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import weights

from megatron.bridge import AutoBridge


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_norm_of_keys_has_the_size_of_the_keys(heads, tmp_path):
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        num_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    hf = tmp_path / "hf"
    transformers.OlmoeForCausalLM(config).save_pretrained(hf)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    sizes = {key.split(".")[-2]: tensor.shape[-1] for key, tensor in weights(tmp_path / "out" / "release").items()}
    assert sizes["q_layernorm"] == 64 and sizes["k_layernorm"] == 16 * heads
    AutoBridge.from_hf_pretrained(hf).export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    source, back = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert source.keys() == back.keys() and all(source[name].equal(back[name]) for name in source)
