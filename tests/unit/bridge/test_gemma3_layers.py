# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 has the layers with and without windows that its config says."""

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from megatron.bridge import AutoBridge


L, G = "sliding_attention", "full_attention"
PATTERNS = {
    (5, 1): [L, L, L, L, L, G, L],
    (1, 1): [L, G, L, G],
    (0, 1): [G, G, G, G],
    (4, 1): [L, L, L, L],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_follows_the_kinds_of_layers(pattern: tuple[int, int]) -> None:
    kinds = PATTERNS[pattern]
    text = Gemma3TextConfig(num_hidden_layers=len(kinds), layer_types=kinds, architectures=["Gemma3ForCausalLM"])
    whole = Gemma3Config(text_config=text, architectures=["Gemma3ForConditionalGeneration"])
    for config in (text, whole):
        made = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
        assert made.interleaved_attn_pattern == pattern
