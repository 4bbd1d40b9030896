# SPDX-License-Identifier: Apache-2.0
"""Multimodal models have the RoPE base and sections of their config."""

from types import SimpleNamespace

import pytest
import transformers

from megatron.bridge.models.glm_vl.glm_45v_bridge import GLM45VBridge
from megatron.bridge.models.qwen_omni.qwen3_omni_bridge import Qwen3OmniBridge
from megatron.bridge.models.qwen_omni.qwen25_omni_bridge import Qwen25OmniBridge
from megatron.bridge.models.qwen_vl.qwen25_vl_bridge import Qwen25VLBridge


ROPE = {"rope_type": "default", "rope_theta": 20000.0, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    "bridge, config_class",
    [
        (Qwen25VLBridge, transformers.Qwen2_5_VLConfig),
        (GLM45VBridge, transformers.Glm4vMoeConfig),
        (Qwen25OmniBridge, transformers.Qwen2_5OmniConfig),
        (Qwen3OmniBridge, transformers.Qwen3OmniMoeConfig),
    ],
)
def test_provider_has_the_positions_of_the_config(bridge, config_class):
    config = config_class()
    text = getattr(config, "thinker_config", config).text_config
    text.rope_parameters = dict(text.rope_parameters) | ROPE
    text.head_dim, text.use_qk_norm = 16, False  # which GLM-4.5V has in config.json, and its class not
    made = bridge().provider_bridge(SimpleNamespace(config=config))
    assert (made.rotary_base, made.mrope_section) == (20000.0, [2, 3, 3])
