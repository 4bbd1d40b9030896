# SPDX-License-Identifier: Apache-2.0
"""A config.json that transformers can't compute is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from published_configs import PUBLISHED
from test_config_check import CONFIGS, SIZES

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.config_values import check_values


QWEN2 = {"model_type": "qwen2"}
NEMOTRON = {"model_type": "nemotron", "hidden_act": "relu2"}


def config_of(name: str, **changes: Any) -> Any:
    """Return a small config with values that its class may refuse by itself."""
    known = CONFIGS | {"Qwen2": QWEN2, "Nemotron": NEMOTRON}
    values = SIZES | known[name]
    config = getattr(transformers, f"{name}Config")(**{key: values[key] for key in values if key != "model_type"})
    rope = changes.pop("rope", None)
    if rope is not None:
        new = hasattr(config, "rope_parameters")
        changes |= {"rope_parameters": {"rope_theta": 10000.0} | rope} if new else {"rope_scaling": rope}
    for key, value in changes.items():
        config.__dict__[key] = value  # a class of transformers 5 takes no other types
    return config


class Bridge:
    """What `check_values` reads of an `AutoBridge`."""

    def __init__(self, config: Any) -> None:
        self.hf_pretrained = config


@pytest.mark.parametrize("name", [*CONFIGS, "Qwen2", "Nemotron"])
def test_plain_config_is_taken(name: str) -> None:
    changes = {"num_key_value_heads": 4} if name.startswith("Deepseek") else {}
    check_values(Bridge(config_of(name, **changes)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(copy.deepcopy(PUBLISHED[name])))
    check_values(AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(tmp_path)))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Qwen2", {"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "and sliding_window is None"),
        ("Qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, expected 4"),
        ("Qwen2", {"hidden_act": "squared_relu"}, "hidden_act is 'squared_relu', which transformers doesn't have"),
        ("Nemotron", {"hidden_act": "squared_relu"}, "hidden_act is 'squared_relu', which transformers doesn't have"),
        ("Nemotron", {"norm_eps": float("nan")}, "norm_eps is nan, expected a number of 0 or more"),
        ("Llama", {"pad_token_id": 384}, "pad_token_id is 384, expected less than vocab_size (384), or null"),
        ("Llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a number of 0 or more"),
        ("Llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number of 0 or more"),
        ("Llama", {"attention_dropout": None}, "attention_dropout is None, expected a number from 0 to 1"),
        ("Llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number of 1 or more"),
        ("Llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number of 1 or more"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads"),
        ("Llama", {"num_key_value_heads": 8}, "num_key_value_heads is 8, expected a divisor of num_attention_heads"),
        ("Llama", {"head_dim": 16.0}, "head_dim is 16.0, expected a whole number of 1 or more"),
        ("DeepseekV3", {"num_key_value_heads": 8}, "num_key_value_heads is 8, expected 4 as num_attention_heads"),
        ("Qwen3Moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most 8"),
        (
            "Qwen3Moe",
            {"num_experts_per_tok": None},
            "num_experts_per_tok is None, expected a whole number of 1 or more",
        ),
        ("Qwen3Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a whole number of 1 or more"),
        ("Qwen3Moe", {"n_group": 1.0}, "n_group is 1.0, expected a whole number of 0 or more"),
        ("Nemotron", {"num_key_value_heads": None}, "num_key_value_heads is None, expected a whole number"),
        ("GptOss", {"head_dim": 15}, "head_dim is 15, expected an even number"),
        ("DeepseekV3", {"n_group": 3}, "n_group is 3, expected groups of equal size, of 2 or more of 8 experts"),
        ("DeepseekV3", {"n_group": 8, "topk_group": 4}, "n_group is 8, expected groups of equal size, of 2 or more"),
        ("Glm4Moe", {"n_group": 2, "topk_group": 3}, "topk_group is 3, expected at most n_group (2)"),
        (
            "Glm4Moe",
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3, expected at most 2, those of topk_group",
        ),
        ("DeepseekV3", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf, expected a number"),
        ("DeepseekV3", {"first_k_dense_replace": None}, "first_k_dense_replace is None, expected a whole number"),
        ("Llama", {"rope": {"rope_type": "foo"}}, "rope_type is 'foo', which transformers doesn't have"),
        (
            "Llama",
            {"rope": {"rope_type": "linear", "factor": None}},
            "factor of RoPE is None, expected a number above 0",
        ),
        (
            "Llama",
            {"rope": {"rope_type": "linear", "factor": "4"}},
            "factor of RoPE is '4', expected a number above 0",
        ),
        (
            "Llama",
            {"rope": {"rope_type": "yarn", "factor": True}},
            "factor of RoPE is True, expected a number above 0",
        ),
        (
            "Llama",
            {"rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0}},
            "low_freq_factor of RoPE is 0",
        ),
        (
            "Llama",
            {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32.5}},
            "original_max_position_embeddings is 32.5, expected a whole number of 1 or more",
        ),
        ("DeepseekV3", {"qk_head_dim": None}, "qk_head_dim is None, expected a whole number of 1 or more"),
        ("Qwen2", {"head_dim": 0}, "head_dim is 0, expected a whole number of 1 or more"),
        ("DeepseekV3", {"n_routed_experts": 0}, "n_routed_experts is 0, expected a whole number of 1 or more"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(
    caplog: pytest.LogCaptureFixture, name: str, changes: dict[str, Any], words: str
) -> None:
    """The error is one line that names key and value; `strict=False` warns in the same words."""
    refused = Bridge(config_of(name, **changes))
    with pytest.raises(ValueError, match="transformers can't compute such a model") as error:
        check_values(refused)
    assert words in str(error.value) and "\n" not in str(error.value)
    check_values(refused, strict=False)
    assert words in caplog.text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"pad_token_id": -1}),
        ("Llama", {"rope": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}}),
        ("Llama", {"pad_token_id": None}),
        ("Llama", {"attention_dropout": 0.1}),
        ("Llama", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}),
        ("Qwen3Moe", {"n_group": 3}),
        ("Llama", {"num_experts_per_tok": 0, "moe_intermediate_size": None, "first_k_dense_replace": None}),
        ("Qwen2", {"kv_lora_rank": None, "v_head_dim": None, "n_group": None, "qk_head_dim": None}),
        ("DeepseekV2", {"n_group": 8, "topk_group": 4, "topk_method": "group_limited_greedy"}),
    ],
)
def test_what_transformers_computes_is_taken(name: str, changes: dict[str, Any]) -> None:
    check_values(Bridge(config_of(name, **changes)))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has it beside the scaling")
@pytest.mark.parametrize("theta", [0, -1.0, "10000", None, float("nan")])
def test_rope_has_a_base(theta: Any) -> None:
    with pytest.raises(ValueError, match="rope_theta of RoPE is .*, expected a number above 0"):
        check_values(Bridge(config_of("Llama", rope={"rope_type": "default", "rope_theta": theta})))


def test_family_without_table_is_not_looked_at() -> None:
    config = transformers.PretrainedConfig(pad_token_id=99)
    config.model_type = "other"
    check_values(Bridge(config))


@pytest.mark.parametrize("value", [None, 0, False])
def test_truncate_is_a_switch(value: Any) -> None:
    """Megatron-LM's flag is printed for False alone."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": value}
    config = config_of("Llama", rope=rope)
    config.architectures = ["LlamaForCausalLM"]
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert provider.yarn_correction_range_round_to_int is False
