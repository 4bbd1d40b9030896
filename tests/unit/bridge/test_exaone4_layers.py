# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4 has the layers that its config says."""

from types import SimpleNamespace
from typing import Any

from transformers import Exaone4Config

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.config_check import check_config
from megatron.bridge.models.exaone.exaone4.exaone4_bridge import Exaone4Bridge


def provider(**values: Any) -> Any:
    """Return what the bridge makes of a small config."""
    config = Exaone4Config(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, **values)
    return Exaone4Bridge().provider_bridge(SimpleNamespace(config=config))


def test_local_layers_have_windows_and_global_ones_no_positions():
    made = provider(sliding_window=32, sliding_window_pattern=4)
    assert made.window_size == (31, 0) and made.window_attn_skip_freq == [1, 1, 1, 0]
    assert made.no_rope_freq == [0, 0, 0, 1]


def test_all_layers_are_alike_without_windows():
    made = provider(sliding_window=None, layer_types=["full_attention"] * 4)
    assert made.window_size is None and made.no_rope_freq is None


def test_published_spelling_of_the_pattern_is_taken():
    """The 32B has LLLG beside the kinds of its layers."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    pattern = {"sliding_window": 32, "sliding_window_pattern": "LLLG", "layer_types": kinds}
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    check_config(AutoBridge.from_hf_config(Exaone4Config(architectures=["Exaone4ForCausalLM"], **sizes, **pattern)))
