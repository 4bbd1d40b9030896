# SPDX-License-Identifier: Apache-2.0
"""RoPE and sliding windows of a config reach the provider, and Megatron Core's frequencies are transformers'."""

from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.rope_scaling import (
    carry_over,
    check_windows,
    megatron_rope,
    megatron_windows,
    own_config,
    transformers_rope,
)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "Llama 3": LLAMA_3,
    "YaRN": YARN,
    "YaRN, attention factor": YARN | {"attention_factor": 0.8},
    "YaRN, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "YaRN, mscale": YARN | {"mscale": 0.7},
    "YaRN, both mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    "YaRN, truncate": YARN | {"truncate": False},
}


def provider_of(family: str, **values: Any) -> tuple[Any, Any]:
    """Return the provider of a family's config, and the config."""
    config = getattr(transformers, f"{family}Config")(architectures=[f"{family}ForCausalLM"], **(SIZES | values))
    return AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False), config


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaling_reaches_the_provider(family: str, scaling: dict[str, Any]) -> None:
    """Frequencies and factor are those of transformers."""
    provider, config = provider_of(family, rope_parameters={"rope_theta": 20000.0, **scaling})
    (exact, attention), (found, factor) = transformers_rope(config), megatron_rope(provider)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert factor == pytest.approx(attention)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_megatron_core_has_these_frequencies(monkeypatch: pytest.MonkeyPatch, scaling: dict[str, Any]) -> None:
    """What Megatron Core's own modules make of the provider turns by the same angles."""
    monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")
    provider, _ = provider_of("Llama", rope_parameters={"rope_theta": 20000.0, **scaling})
    shared = {"kv_channels": 16, "rotary_base": provider.rotary_base, "use_cpu_initialization": True}
    factor = 1.0
    if provider.position_embedding_type == "yarn":
        module = YarnRotaryEmbedding(
            scaling_factor=provider.yarn_rotary_scaling_factor,
            original_max_position_embeddings=provider.yarn_original_max_position_embeddings,
            beta_fast=provider.yarn_beta_fast,
            beta_slow=provider.yarn_beta_slow,
            mscale=provider.yarn_mscale,
            mscale_all_dim=provider.yarn_mscale_all_dim,
            correction_range_round_to_int=provider.yarn_correction_range_round_to_int,
            **shared,
        )
        angles, factor = module.get_emb(2)
    else:
        module = RotaryEmbedding(
            rotary_percent=provider.rotary_percent,
            seq_len_interpolation_factor=provider.seq_len_interpolation_factor,
            rope_scaling=provider.rope_scaling,
            rope_scaling_factor=provider.rope_scaling_factor,
            **shared,
        )
        angles = module.get_emb(2)
    frequencies, expected = megatron_rope(provider)
    torch.testing.assert_close(angles[1].flatten()[:8], frequencies, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected)


def test_config_of_a_checkpoints_code_is_read_as_transformers_own() -> None:
    """Its module has no model that could be asked for frequencies."""

    class RemoteConfig(transformers.PretrainedConfig):
        model_type = "mistral"

    remote = RemoteConfig(**SIZES, sliding_window=8, head_dim=16, rope_theta=20000.0)
    provider, _ = provider_of("Mistral", sliding_window=None)
    carry_over(provider, remote)
    assert megatron_windows(provider) == [8] * 4
    assert type(own_config(remote)) is transformers.MistralConfig


@pytest.mark.parametrize("part", [0.25, 1.0])
def test_partial_rotary_reaches_the_provider(part: float) -> None:
    """Also where only `rope_parameters` has it."""
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": part}
    provider, _ = provider_of("Nemotron", rope_parameters=rope)
    assert provider.rotary_percent == part


@pytest.mark.parametrize(
    ("family", "values", "windows"),
    [
        ("Mistral", {"sliding_window": 8}, [8, 8, 8, 8]),
        ("Mistral", {"sliding_window": None}, [None] * 4),
        ("Mistral", {"sliding_window": 8, "use_sliding_window": False}, [8, 8, 8, 8]),
        ("Llama", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, [None] * 4),
        ("Qwen3Moe", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, [8, 8, 8, 8]),
        ("Qwen2", {"sliding_window": 8}, [None] * 4),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, [8, 8, 8, 8]),
        ("Qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 8]),
        ("GptOss", {"sliding_window": 8}, [8, None, 8, None]),
        (
            "GptOss",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            [None] * 3 + [8],
        ),
    ],
)
def test_windows_reach_the_provider(family: str, values: dict[str, Any], windows: list[int | None]) -> None:
    """Each layer has the window that transformers gives it."""
    provider, _ = provider_of(family, **values)
    assert megatron_windows(provider) == windows


@pytest.mark.parametrize("kind", ["GptOssConfig", "Gemma2Config"])
def test_windows_without_a_size_are_refused(kind: str) -> None:
    """A bridge would compute with None."""
    config = getattr(transformers, kind)()
    check_windows(config)
    config.sliding_window = None
    with pytest.raises(ValueError, match="sliding_window is None, expected a number"):
        check_windows(config)
    check_windows(transformers.MistralConfig(sliding_window=None))
