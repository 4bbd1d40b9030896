# SPDX-License-Identifier: Apache-2.0
"""What is known to make another model is refused, in families whose config.json has no table."""

from typing import Any

import pytest
import transformers

from megatron.bridge.models.conversion.unproved_config import KINDS_OF_ROPE, ONLY, known_problems


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


def config(kind: str, **values: Any) -> Any:
    """Return the default config of a family, with values of its text model."""
    made = transformers.CONFIG_MAPPING[kind]()
    text = getattr(made, "text_config", made)
    for name, value in values.items():
        setattr(text, name, value)
    return made


@pytest.mark.parametrize("kind", sorted(KINDS_OF_ROPE | ONLY))
def test_default_config_is_taken(kind: str) -> None:
    assert list(known_problems(config(kind))) == []


@pytest.mark.parametrize("kind", KINDS_OF_ROPE)
def test_scaling_is_refused(kind: str) -> None:
    scaled = config(kind)
    text = getattr(scaled, "text_config", scaled)
    text.rope_parameters = {**(text.rope_parameters or {}), **YARN}
    assert list(known_problems(scaled)) == ["rope_type is 'yarn', which Bridge's model doesn't have"]


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act is 'gelu', Bridge's model has 'silu'"),
        ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act is 'gelu', Bridge's model has 'silu'"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu', Bridge's model has 'relu2'"),
        ("nemotron_h", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, expected two or more"),
    ],
)
def test_value_is_refused(kind: str, values: dict[str, Any], words: str) -> None:
    assert list(known_problems(config(kind, **values))) == [words]
