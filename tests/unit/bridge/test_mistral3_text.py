# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 has the positions that the config of its text model says."""

from types import SimpleNamespace

import pytest
from transformers import Mistral3Config

from megatron.bridge.models.ministral3.ministral3_bridge import Ministral3Bridge


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}


def provider(model_type, **rope):
    text = {"model_type": model_type, "rope_parameters": rope, "rms_norm_eps": 1e-4, "head_dim": 16}
    return Ministral3Bridge().provider_bridge(SimpleNamespace(config=Mistral3Config(text_config=text)))


def test_mistral_has_plain_positions():
    made = provider("mistral", rope_type="default", rope_theta=1e6)
    assert made.position_embedding_type == "rope" and made.layernorm_epsilon == 1e-4


def test_ministral_has_the_yarn_of_its_config():
    made = provider("ministral3", **YARN, beta_fast=16.0, mscale=0.5)
    assert made.position_embedding_type == "yarn"
    assert (made.yarn_rotary_scaling_factor, made.yarn_original_max_position_embeddings) == (4.0, 64)
    assert (made.yarn_beta_fast, made.yarn_beta_slow) == (16.0, 1.0)
    assert (made.yarn_mscale, made.yarn_mscale_all_dim) == (0.5, None)
    assert made.yarn_correction_range_round_to_int


def test_the_range_of_yarn_is_not_rounded_without_truncate():
    assert not provider("ministral3", **YARN, truncate=False).yarn_correction_range_round_to_int


def test_others_are_refused():
    with pytest.raises(ValueError, match="rope_type is 'linear', expected 'default' or 'yarn'"):
        provider("mistral", rope_type="linear", rope_theta=1e6, factor=2.0)
