# SPDX-License-Identifier: Apache-2.0
"""Settings and layers of a model on a host without an accelerator and Transformer Engine."""

from functools import partial

import pytest
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron.bridge.host import accelerator
from megatron.bridge.host.settings import as_recorded
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="shows what happens without an accelerator and Transformer Engine"
)


def finalized(**settings):
    provider = GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4, **settings)
    provider.finalize()
    return provider


def test_what_the_host_lacks_is_put_back_in_a_copy_only():
    provider = finalized(apply_rope_fusion=True, moe_router_load_balancing_type="global_aux_loss")
    recorded = as_recorded(provider)
    assert (provider.apply_rope_fusion, recorded.apply_rope_fusion) == (False, True)
    assert (provider.use_cpu_initialization, recorded.use_cpu_initialization) == (True, False)
    assert provider.moe_router_load_balancing_type == "aux_loss"
    assert recorded.moe_router_load_balancing_type == "global_aux_loss"


def test_a_setting_of_the_user_is_recorded_as_it_is():
    provider = finalized(apply_rope_fusion=False)
    provider.finalize()
    assert as_recorded(provider).apply_rope_fusion is False


def test_a_fusion_that_the_host_was_asked_for_is_recorded_as_on():
    assert finalized().gradient_accumulation_fusion is False
    assert as_recorded(finalized()).gradient_accumulation_fusion is True


def test_layers_are_megatron_cores_own():
    attention = default_layer_spec(finalized()).submodules.self_attention
    assert attention.submodules.linear_qkv is ColumnParallelLinear


def test_a_spec_that_asks_for_transformer_engine_does_not_while_the_model_is_converted():
    provider = finalized(transformer_layer_spec=partial(get_gpt_decoder_block_spec, use_transformer_engine=True))
    assert provider.transformer_layer_spec.keywords == {"use_transformer_engine": False}
    assert as_recorded(provider).transformer_layer_spec.keywords == {"use_transformer_engine": True}
