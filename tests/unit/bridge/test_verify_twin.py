# SPDX-License-Identifier: Apache-2.0
"""The config of a twin keeps what an error could hide in."""

import pytest
import transformers

from megatron.bridge.verify.twin import LAYERS, chosen_layers, twin_values, why_no_twin


def kinds(text: str) -> list[str]:
    return list(text)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("a" * 126, [0, 1, 2, 3]),
        ("a", [0]),
        ("aa", [0, 1]),
        ("ddd" + "s" * 58, [0, 3, 4, 5]),
        ("sf" * 12, [0, 1, 2, 3]),
        ("sssssf" * 8, [0, 1, 2, 3, 4, 5]),
        ("sssssf" * 4 + "ss", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("f" * 28 + "w" * 52, [0, 28, 29, 30]),
        ("abcdefghijklmnopqrstuvwxyz", None),
    ],
)
def test_layers_are_a_period_with_the_first_and_the_last_kind(layers: str, expected: list[int] | None):
    found = chosen_layers(kinds(layers))
    assert found == expected or expected is None
    assert {layers[i] for i in found} == set(layers)
    assert (layers[found[0]], layers[found[-1]]) == (layers[0], layers[-1])
    assert len(found) <= LAYERS or len(found) == len(set(layers))


def values(kind: str, **changes: object) -> dict:
    return getattr(transformers, kind)(**changes).to_dict()


def test_llama_3_1_405b():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    whole = values(
        "LlamaConfig",
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=rope,
        bos_token_id=128000,
        eos_token_id=[128001, 128008],
    )
    small = twin_values(whole)
    expected = {"hidden_size": 512, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    expected |= {"num_key_value_heads": 2, "vocab_size": 512, "head_dim": 128, "rope_parameters": rope}
    assert small | expected == small
    assert small["eos_token_id"] == [2] and small["max_position_embeddings"] == 131072


def test_classes_of_numbers_stay():
    same = twin_values(values("LlamaConfig", num_attention_heads=32, num_key_value_heads=32, vocab_size=32001))
    assert same["num_attention_heads"] == same["num_key_value_heads"] and same["vocab_size"] % 128 == 1
    one = twin_values(values("GemmaConfig", num_key_value_heads=1, head_dim=256, hidden_size=2048))
    assert one["num_key_value_heads"] == 1 and one["head_dim"] == 256
    wide = twin_values(values("Qwen3Config", head_dim=128, hidden_size=2048, num_attention_heads=32))
    assert wide["head_dim"] * wide["num_attention_heads"] != wide["hidden_size"]


def test_groups_of_experts_keep_how_many_rate_them():
    small = twin_values(values("DeepseekV3Config"))  # 256 experts, 8 groups, of which 4, and 8 experts a token
    assert (small["n_routed_experts"], small["n_group"], small["topk_group"]) == (8, 2, 1)
    assert small["num_experts_per_tok"] // small["topk_group"] == 2
    assert small["first_k_dense_replace"] == 1 and small["qk_rope_head_dim"] == 64


def test_windows_and_lists_of_layers_are_cut_together():
    small = twin_values(values("Qwen2Config", use_sliding_window=True, max_window_layers=28, num_hidden_layers=80))
    assert small["sliding_window"] == 64 and small["max_window_layers"] == 1
    assert small["layer_types"] == ["full_attention", *["sliding_attention"] * 3]


def test_scaling_that_sets_in_with_the_length_sets_in():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 4096, "factor": 32.0}
    whole = values("LlamaConfig", rope_parameters=rope, max_position_embeddings=131072)
    small = twin_values(whole)
    assert small["rope_parameters"]["original_max_position_embeddings"] == 64
    assert small["max_position_embeddings"] == 64 * 32


def test_no_twin_is_made_of_a_model_with_a_tower():
    """The reason says so in plain words."""
    reason = why_no_twin(values("Qwen2_5_VLConfig"))
    assert "vision or audio tower (config.json has text_config, vision_config)" in reason
    assert why_no_twin(values("LlamaConfig")) is None
