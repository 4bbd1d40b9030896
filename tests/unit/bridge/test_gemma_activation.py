# SPDX-License-Identifier: Apache-2.0
"""Gemma has the activation that its config names."""

import pytest
import transformers

from megatron.bridge import AutoBridge


SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(("act", "function"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "fast_gelu"), ("silu", "silu")])
def test_gemma_computes_the_activation_of_transformers(act: str, function: str) -> None:
    """`hidden_activation` is a key that transformers doesn't read."""
    config = transformers.GemmaConfig(
        **SIZES, architectures=["GemmaForCausalLM"], hidden_act=act, hidden_activation="relu"
    )
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert provider.activation_func.__name__ == function
