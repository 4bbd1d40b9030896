# SPDX-License-Identifier: Apache-2.0
"""A layer of Nemotron-Labs-Diffusion makes its mask when it uses it."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.diffusion.models.common import nemotron_labs_diffusion_attention as module


@pytest.fixture
def config():
    made = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, num_query_groups=2, attention_dropout=0.0
    )
    made.seq_length, made.block_size = 8, 4
    made.hf_config = SimpleNamespace(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, head_dim=16, hidden_size=32
    )
    return made


def test_a_mask_is_made_in_the_first_forward_pass(config, monkeypatch):
    made, used = [], []

    def mask(block_size, max_seq_length):
        made.append((block_size, max_seq_length))
        return object()

    def attention(query, key, value, block_mask):
        used.append(block_mask)
        return value

    monkeypatch.setattr(module, "compute_block_mask", mask)
    monkeypatch.setattr(module, "fused_flex_attention", attention)
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    layer = module.NemotronLabsDiffusionAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    assert not made
    monkeypatch.setattr(layer, "attention_dropout", torch.nn.Identity())
    config.sequence_parallel = True  # no random state of a device
    for _ in range(2):
        layer(*(torch.zeros(16, 1, 2, 16) for _ in range(3)))
    assert made == [(4, 8)] and used[0] is used[1] is layer.mask
