# SPDX-License-Identifier: Apache-2.0
"""Modules that Megatron Core ties to CUDA or Transformer Engine are built without them."""

import os

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.host import accelerator
from megatron.bridge.host.modules import building_on_this_host


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="shows what happens without an accelerator and Transformer Engine"
)


def config(**settings):
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        add_bias_linear=False,
        **settings,
    )


@accelerator.with_process_group
def test_the_expert_bias_of_a_router_is_on_the_cpu():
    settings = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_score_function": "sigmoid"}
    biased = config(moe_router_enable_expert_bias=True, **settings)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with building_on_this_host():
        router, plain = (TopKRouter(config=each, pg_collection=groups) for each in (biased, config(**settings)))
    assert router.expert_bias.device.type == "cpu" and router.expert_bias.dtype == torch.float32
    assert router.expert_bias.tolist() == router.local_tokens_per_expert.tolist() == [0.0] * 4
    assert "expert_bias" in router.state_dict() and "local_tokens_per_expert" not in router.state_dict()
    assert router.config is biased and router.enable_expert_bias
    assert plain.expert_bias is None


@accelerator.with_process_group
def test_the_embedding_of_yarn_leaves_its_cache_empty():
    with building_on_this_host():
        embedding = YarnRotaryEmbedding(8, original_max_position_embeddings=16, use_cpu_initialization=True)
    assert embedding.max_seq_len_cached == 0
    assert {tensor.device.type for tensor in vars(embedding).values() if torch.is_tensor(tensor)} <= {"cpu"}


@accelerator.with_process_group
@pytest.mark.parametrize("softmax", ["vanilla", "off-by-one", "learnable"])
def test_attention_takes_the_head_sizes_of_latent_attention(softmax):
    with building_on_this_host():
        attention = DotProductAttention(
            config=config(softmax_type=softmax),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            k_channels=6,
            v_channels=4,
        )
    assert (attention.softmax_offset is None) == (softmax == "vanilla")
    assert ("softmax_offset" in attention.state_dict()) == (softmax == "learnable")


def test_megatron_core_and_the_environment_are_restored(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")
    before, environment = (TopKRouter.__init__, DotProductAttention.__init__), dict(os.environ)
    with pytest.raises(ValueError, match="no model"), building_on_this_host():
        assert TopKRouter.__init__ is not before[0]
        os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"}
        raise ValueError("no model")
    assert (TopKRouter.__init__, DotProductAttention.__init__) == before
    assert dict(os.environ) == environment
