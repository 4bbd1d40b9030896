# SPDX-License-Identifier: Apache-2.0
"""Latent attention whose query isn't compressed has a norm for its keys and values alone."""

import pytest
from safetensors.torch import load_file
from tiny_models import save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.plain_query import PlainQueryAttention
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.release_checkpoint.flags import launch_lines


def test_it_goes_out_and_back_without_a_norm_in_front_of_the_query(tmp_path):
    hf = save_hf_model(tmp_path / "hf", "deepseek-v3", q_lora_rank=None)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    keys = weights(tmp_path / "out" / "release").keys()
    assert any("linear_q_proj.weight" in key for key in keys)
    assert not any("linear_q_proj.layer_norm" in key or "q_layernorm" in key for key in keys)
    assert any("linear_kv_up_proj.layer_norm_weight" in key for key in keys)
    AutoBridge.from_hf_pretrained(hf).export_ckpt(tmp_path / "out", tmp_path / "back", show_progress=False)
    source, back = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert source.keys() == back.keys() and all(source[name].equal(back[name]) for name in source)


@pytest.mark.parametrize("rank, plain", [(None, True), (24, False)])
def test_only_a_plain_query_is_built_and_said(rank, plain, tmp_path):
    hf = save_hf_model(tmp_path / "hf", "deepseek-v3", q_lora_rank=rank)
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.finalize()
    with accelerator.gloo_group():
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    assert any(isinstance(each, PlainQueryAttention) for each in model.modules()) == plain
    lines = launch_lines("OUT", megatron_lm_args(provider))
    assert ("puts a norm in front of the query" in lines[0]) == plain
