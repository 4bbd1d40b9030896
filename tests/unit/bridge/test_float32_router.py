# SPDX-License-Identifier: Apache-2.0
"""The routers of ERNIE 4.5 keep their weights in float32."""

import pytest
import torch
import yaml
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from tiny_models import hf_config

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.ernie import ernie_45_bridge
from megatron.bridge.models.ernie_vl.modeling_ernie45_vl import ernie_decoder_layer_spec
from megatron.bridge.models.float32_router import Float32Router, with_float32_routers
from megatron.bridge.training.untrusted_run_config import vet_run_config
from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")  # of buffers that aren't saved
    made = AutoBridge.from_hf_config(hf_config("qwen3-moe")).to_megatron_provider(load_weights=False)
    made.moe_layer_freq = [0] + [1] * (made.num_layers - 1)
    made.apply_rope_fusion = made.moe_permute_fusion = False  # they need Transformer Engine
    made.finalize()
    with accelerator.gloo_group():
        yield made


def test_layers_of_experts_have_such_a_router(provider):
    spec = with_float32_routers(get_gpt_decoder_block_spec)(provider, use_transformer_engine=False)
    dense, *others = (layer.submodules.mlp for layer in spec.layer_specs)
    assert others and all(each.func is MoELayer for each in others)
    assert all(each.keywords["submodules"].router is Float32Router for each in others)
    assert dense.func is not MoELayer


@pytest.mark.parametrize("router_dtype", [None, "fp32"])
def test_its_weight_is_float32_and_it_computes(provider, router_dtype):
    provider.params_dtype, provider.moe_router_dtype = torch.bfloat16, router_dtype
    router = Float32Router(provider, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    assert router.weight.dtype == torch.float32
    assert router._keep_in_float32_parameter_names == ("weight",)
    values = torch.randn(2, 1, provider.hidden_size, dtype=torch.bfloat16)
    wanted = values.float() @ router.weight.T
    assert router.gating(values).equal(wanted)


def test_ernie_asks_for_it_under_its_own_name():
    """run_config.yaml names the function that makes the spec."""
    spec = ernie_45_bridge._ernie45_decoder_block_spec
    saved = yaml.safe_load(dump_dataclass_to_yaml({"model": {"transformer_layer_spec": spec}}))
    target = saved["model"]["transformer_layer_spec"]["_target_"]
    assert target.endswith("ernie_45_bridge._ernie45_decoder_block_spec")
    vet_run_config(saved, "model", "run_config.yaml")
    layer = ernie_decoder_layer_spec._get_mlp_module_spec(num_experts=2)
    for each in (layer.submodules.text_moe_layer, layer.submodules.vision_moe_layer):
        assert each.submodules.router is Float32Router
