# SPDX-License-Identifier: Apache-2.0
"""A config.json that changes what the model computes is followed, or refused by name."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.config_check import check_config


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 384,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = EXPERTS | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "Llama": {"model_type": "llama"},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Qwen3Moe": {"model_type": "qwen3_moe", **EXPERTS, "num_experts": 8, "norm_topk_prob": True},
    "DeepseekV2": {"model_type": "deepseek_v2", **ROUTED, "topk_method": "greedy"},
    "DeepseekV3": {"model_type": "deepseek_v3", **ROUTED},
    "Glm4Moe": {"model_type": "glm4_moe", **ROUTED},
    "GptOss": {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2},
    "Olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Next": {"model_type": "qwen3_next"},
    "Gemma2": {"model_type": "gemma2", "sliding_window_size": 4096, "cache_implementation": "hybrid"},
    "Gemma3": {"model_type": "gemma3_text", "rope_local_base_freq": 10000},
}


def bridge(folder: Path, name: str, **changes: Any) -> AutoBridge:
    """Return the bridge of a small config, with changes."""
    config = {"architectures": [f"{name}ForCausalLM"], **SIZES, **CONFIGS[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_config_is_taken(tmp_path: Path, name: str) -> None:
    """A config without anything of these passes."""
    check_config(bridge(tmp_path, name))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Llama", {"attention_bias": True}, "attention_bias is True"),
        ("Llama", {"mlp_bias": True}, "attention_bias is False, Bridge's model has True"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic', which changes with"),
        ("Mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu', Bridge's model has silu"),
        ("Llama", {"is_causal": False}, "is_causal is False, expected True"),
        ("Llama", {"model_type": "qwen2"}, "architectures is 'LlamaForCausalLM', expected 'Qwen2ForCausalLM'"),
        ("Mistral", {"sliding_window": 0}, "sliding_window is 0, expected another value"),
        ("Qwen3Moe", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen3Moe", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', expected 'softmax'"),
        ("GptOss", {"n_group": 2, "topk_group": 1}, "n_group is 2, expected 1"),
        ("DeepseekV2", {"n_group": 2}, "topk_method is 'greedy', Bridge's model chooses 1 of 2 groups"),
        ("DeepseekV3", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, which Bridge's latent attention uses"),
        ("DeepseekV3", {"norm_topk_prob": False}, "norm_topk_prob is False, expected True"),
        ("DeepseekV3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', expected 'sigmoid'"),
        ("Glm4Moe", {"tie_word_embeddings": True}, "tie_word_embeddings is True, Bridge's model has False"),
        ("GptOss", {"attention_bias": False}, "attention_bias is False, expected True"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, expected None"),
        ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', Bridge's model has fast_gelu"),
        ("Qwen3Next", {"hidden_act": "gelu"}, "hidden_act is 'gelu', Bridge's model has 'silu'"),
        ("Gemma3", {"final_logit_softcapping": 5.0}, "final_logit_softcapping is 5.0, expected None"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, changes: dict[str, Any], words: str
) -> None:
    """The error is one line that names key and value; `strict=False` warns in the same words."""
    refused = bridge(tmp_path, name, **changes)
    with pytest.raises(ValueError, match="Megatron Core would compute another model") as error:
        check_config(refused)
    assert words in str(error.value) and "\n" not in str(error.value)
    check_config(refused, strict=False)
    assert words in caplog.text


def test_key_that_a_newer_transformers_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of the config class that no table knows has to be at its default."""
    monkeypatch.setattr(
        "megatron.bridge.models.conversion.config_check._read", lambda kind: {"logit_cap", "hidden_act"}
    )
    with pytest.raises(ValueError, match="logit_cap is 30.0, and nothing carries it"):
        check_config(bridge(tmp_path, "Llama", logit_cap=30.0))


def test_family_without_table_is_not_proved(caplog: pytest.LogCaptureFixture) -> None:
    """It is imported, with a warning."""
    config = transformers.PretrainedConfig(architectures=["OtherForCausalLM"])
    config.model_type = "other"
    with caplog.at_level(logging.WARNING):
        check_config(_bridge_of(config))
    assert "other is not proved" in caplog.text


def test_family_that_is_known_to_differ_says_in_what(caplog: pytest.LogCaptureFixture) -> None:
    """The one warning names the difference, which the run config repeats."""
    with caplog.at_level(logging.WARNING):
        check_config(_bridge_of(transformers.Ernie4_5_MoeConfig()))
    (line,) = [each.getMessage() for each in caplog.records if each.name.endswith("config_check")]
    assert "score experts by a sigmoid, those of transformers by a softmax" in line


def _bridge_of(config: Any) -> Any:
    return type("Bridge", (), {"hf_pretrained": type("Model", (), {"config": config})})
