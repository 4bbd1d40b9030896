# SPDX-License-Identifier: Apache-2.0
"""What the keys of config.json mean in families whose layers ask for Transformer Engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Exaone4Config, Gemma3TextConfig

from megatron.bridge.models.conversion.config_keys import WITHOUT_MEANING
from megatron.bridge.models.conversion.layout_config import FAMILIES, problems


GEMMA = {"softmax_scale": 256**-0.5, "rotary_base": (10000.0, 1e6), "rope_scaling_factor": 1.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_key_is_in_one_column(family: str) -> None:
    keys = FAMILIES[family]
    columns = [keys.same, keys.opposite, keys.products, keys.only, WITHOUT_MEANING]
    names = [name for column in columns for name in column]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "provided", "words"),
    [
        ({}, {}, None),
        ({"query_pre_attn_scalar": 64}, {}, "query_pre_attn_scalar scales by 0.125, Bridge's model by 0.0625"),
        ({}, {"rotary_base": (10000.0, 1e4)}, "of full_attention isn't that of Bridge's model"),
        ({"full_attention": LINEAR}, {}, "of full_attention isn't that of Bridge's model"),
        ({"full_attention": LINEAR}, {"rope_scaling_factor": 4.0}, None),
        ({"sliding_attention": LINEAR}, {"rotary_base": (1e6, 1e6)}, "of sliding_attention isn't that of"),
    ],
)
def test_gemma_3_has_two_ropes(changes: dict[str, Any], provided: dict[str, Any], words: str | None) -> None:
    config = Gemma3TextConfig()
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    } | {kind: rope for kind, rope in changes.items() if kind in KINDS}
    config.query_pre_attn_scalar = changes.get("query_pre_attn_scalar", 256)
    found = list(problems(config, SimpleNamespace(**GEMMA | provided)))
    assert len(found) == (words is not None) and (not words or words in found[0])


def test_gemma_3_of_transformers_4_has_two_ropes() -> None:
    linear = {"type": "linear", "factor": 8.0}
    bases = {"rope_local_base_freq": 10000.0, "rope_theta": 1e6, "rope_scaling": linear}
    config = SimpleNamespace(model_type="gemma3_text", query_pre_attn_scalar=256, **bases)
    assert not list(problems(config, SimpleNamespace(**GEMMA | {"rope_scaling_factor": 8.0})))
    assert "of full_attention isn't that of" in next(problems(config, SimpleNamespace(**GEMMA)))


@pytest.mark.parametrize(
    ("window", "without", "words"),
    [
        (8, [0, 1], []),
        (8, None, ["layers without RoPE are [0, 1], in Bridge's model [0, 0]"]),
        (None, None, ["sliding_window is None, and layer_types has 'sliding_attention'"]),
    ],
)
def test_exaone_has_layers_without_positions(window: int | None, without: list[int] | None, words: list[str]) -> None:
    config = Exaone4Config(num_hidden_layers=2, sliding_window=window, layer_types=KINDS)
    assert list(problems(config, SimpleNamespace(no_rope_freq=without))) == words
