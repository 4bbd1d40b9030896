# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 has the layers with and without windows that its config says."""

from types import SimpleNamespace

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from megatron.bridge.models.gemma.gemma3_bridge import Gemma3ModelBridge
from megatron.bridge.models.gemma_vl.gemma3_vl_bridge import Gemma3VLBridge


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
    text = Gemma3TextConfig(num_hidden_layers=len(kinds), layer_types=kinds)
    made = Gemma3ModelBridge().provider_bridge(SimpleNamespace(config=text))
    assert made.interleaved_attn_pattern == pattern
    made = Gemma3VLBridge().provider_bridge(SimpleNamespace(config=Gemma3Config(text_config=text)))
    assert made.interleaved_attn_pattern == pattern
