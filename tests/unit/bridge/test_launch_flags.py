# SPDX-License-Identifier: Apache-2.0
"""The command line with which Megatron-LM builds the model of a checkpoint."""

import logging

import pytest
import torch
import transformers
from tiny_models import hf_config

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.release_checkpoint.flags import launch_lines, megatron_lm_flags


def test_llama_needs_no_flag_but_epsilon_and_rope_scaling():
    provider = AutoBridge.from_hf_config(hf_config("llama-3.1")).to_megatron_provider(load_weights=False)
    short = megatron_lm_flags(megatron_lm_args(provider), use_checkpoint_args=True)
    flags = [word for word in short if word.startswith("--")]
    assert flags == ["--use-checkpoint-args", "--norm-epsilon", "--use-rope-scaling", "--rope-scaling-factor"]


def test_a_rope_scaling_factor_that_megatron_lm_drops_is_reported(caplog):
    config = hf_config("llama-3.1")
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    with caplog.at_level(logging.WARNING):
        megatron_lm_flags(megatron_lm_args(provider))
        assert "drops --rope-scaling-factor" not in caplog.text
        provider.rope_scaling_factor = 32.0
        assert "32.0" in megatron_lm_flags(megatron_lm_args(provider))
    assert "drops --rope-scaling-factor 32.0" in caplog.text


def test_both_command_lines_are_told():
    provider = AutoBridge.from_hf_config(hf_config("llama-3")).to_megatron_provider(load_weights=False)
    args = megatron_lm_args(provider)
    short, whole = launch_lines("OUT", args)
    assert short.endswith("--load OUT --use-checkpoint-args --norm-epsilon 1e-05")
    assert whole.endswith(" ".join(megatron_lm_flags(args)))


def test_a_model_without_flags_gets_none():
    provider = AutoBridge.from_hf_config(hf_config("llama-3.1")).to_megatron_provider(load_weights=False)
    provider.rope_scaling_factor = 32.0
    provider.activation_func = torch.nn.functional.gelu
    (line,) = launch_lines("OUT", megatron_lm_args(provider))
    assert line.startswith("No flags of pretrain_gpt.py give this model")
    assert (
        "the activation gated gelu; " in line and "drops --rope-scaling-factor 32.0" in line and "--load" not in line
    )


@pytest.mark.parametrize(
    "config, architecture, words",
    [
        ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "it is made of models.qwen_vl.qwen3_vl_provider, and"),
        ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", "it is made of models.minimax_m2."),
        ("Qwen3NextConfig", "Qwen3NextForCausalLM", "it is made of gated_delta_net, and a recipe takes"),
        ("NemotronHConfig", "NemotronHForCausalLM", "it has Mamba layers, Megatron-LM's pretrain_hybrid.py takes"),
    ],
)
def test_a_model_that_pretrain_gpt_lacks_gets_none(config, architecture, words):
    bridge = AutoBridge.from_hf_config(getattr(transformers, config)(architectures=[architecture]))
    (line,) = launch_lines("OUT", megatron_lm_args(bridge.to_megatron_provider(load_weights=False)))
    assert words in line and "--" not in line


@pytest.mark.parametrize("family", ["llama-2", "mistral", "qwen2", "qwen3-moe", "deepseek-v3"])
def test_a_model_of_megatron_core_s_layers_gets_flags(family):
    provider = AutoBridge.from_hf_config(hf_config(family)).to_megatron_provider(load_weights=False)
    assert len(launch_lines("OUT", megatron_lm_args(provider))) == 2
