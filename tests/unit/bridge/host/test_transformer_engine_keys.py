# SPDX-License-Identifier: Apache-2.0
"""Keys of a checkpoint that is written without Transformer Engine."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron.bridge.host import layout
from megatron.bridge.models.conversion.param_mapping import AutoMapping


pytestmark = pytest.mark.skipif(HAVE_TE, reason="shows what happens without Transformer Engine")

LAYER = "decoder.layers.0."


def state_dict(*names, keys=()):
    """A model of one layer whose parameters have their names as keys, but for those in `keys`."""
    keys = dict(keys)
    return {
        "model": {
            LAYER + name: ShardedTensor.from_rank_offsets(LAYER + keys.get(name, name), torch.ones(2))
            for name in names
        }
    }


def keys(state_dict):
    return {entry.key.removeprefix(LAYER) for entry in state_dict["model"].values()}


@pytest.mark.parametrize(
    "names, added",
    [
        # A dense layer: Megatron Core itself gives the norms the keys of the projections.
        (
            ["input_layernorm.weight", "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"],
            {"self_attention.linear_qkv.layer_norm_weight"},
        ),
        (
            ["pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias", "mlp.linear_fc1.weight"],
            {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias"},
        ),
        # Experts: the norm is a module of its own, with an extra state.
        (["pre_mlp_layernorm.weight", "mlp.router.weight"], {"pre_mlp_layernorm._extra_state"}),
        # Latent attention.
        (
            [
                "input_layernorm.weight",
                "self_attention.kv_layernorm.weight",
                "self_attention.linear_kv_up_proj.weight",
            ],
            {"input_layernorm._extra_state", "self_attention.linear_kv_up_proj.layer_norm_weight"},
        ),
        (["self_attention.core_attention.softmax_offset"], {"self_attention.core_attention._extra_state"}),
    ],
)
def test_keys_of_transformer_engine_are_added(names, added):
    given = state_dict(*names)
    assert keys(layout.with_transformer_engine_keys(given)) == {*names, *added}
    assert keys(given) == set(names)


def test_a_norm_of_experts_gets_its_own_key_back():
    names = ["pre_mlp_layernorm.weight", "mlp.router.weight"]
    given = state_dict(*names, keys={"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"})
    assert keys(layout.with_transformer_engine_keys(given)) == {
        "mlp.linear_fc1.layer_norm_weight",
        *names,
        "pre_mlp_layernorm._extra_state",
    }


def test_only_the_model_gets_further_keys():
    other = {"optimizer": {}, "iteration": 0, "args": None}
    assert layout.with_transformer_engine_keys(other) == other


def test_entries_get_the_keys_of_the_checkpoint(monkeypatch):
    given = state_dict("input_layernorm.weight", "self_attention.linear_qkv.weight", "pre_mlp_layernorm.weight")
    for module in ("mlp.linear_fc1", "final_layernorm"):
        key = f"{LAYER}{module}._extra_state"
        given["model"][key] = ShardedObject(key, None, (1,), (0,))
    stored = {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1._extra_state",
    }
    tensors = {LAYER + key: None for key in stored if key.endswith("weight")}
    metadata = SimpleNamespace(tensors=tensors, objects=[f"{LAYER}mlp.linear_fc1._extra_state/shard_0_1"])
    monkeypatch.setattr(layout, "check_is_distributed_checkpoint", lambda path: True)
    monkeypatch.setattr(layout, "read_metadata", lambda path: metadata)
    assert keys(layout.match_checkpoint(given, "checkpoint")) == stored


def test_grouped_experts_are_mapped_as_modules_too():
    experts = "decoder.layers.*.mlp.experts."
    grouped = AutoMapping(f"{experts}linear_fc2.weight*", "model.layers.*.mlp.experts.*.down_proj.weight")
    dense = AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight")
    (local,) = layout.local_expert_mappings([grouped, dense])
    assert local.megatron_param == f"{experts}local_experts.*.linear_fc2.weight"
    assert local.hf_param == grouped.hf_param
    assert layout.local_expert_mappings([grouped, dense, local]) == []
