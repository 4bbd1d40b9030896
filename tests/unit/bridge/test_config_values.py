# SPDX-License-Identifier: Apache-2.0
"""Values of config.json that mean something only in one family, or beside another key."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_config_check import bridge
from test_rope_scaling import provider_of

from megatron.bridge.models.conversion.config_check import check_config, problems
from megatron.bridge.models.conversion.config_keys import FAMILIES
from megatron.bridge.models.conversion.rope_scaling import megatron_rope, transformers_rope


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("DeepseekV3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, expected another value"),
        ("DeepseekV2", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, expected another value"),
        ("DeepseekV3", {"topk_group": 0}, "topk_group is 0, expected another value"),
        ("DeepseekV3", {"topk_group": None}, "topk_group is None, expected another value"),
        (
            "DeepseekV3",
            {"n_group": None},
            "n_group is None, expected another value",
        ),
        (
            "DeepseekV3",
            {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
            "rates each of 4 groups by its best 1",
        ),
        ("Mistral", {"sliding_window": -1}, "sliding_window is -1, expected another value"),
        ("GptOss", {"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention', expected"),
    ],
)
def test_a_value_that_means_another_model(tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_config(bridge(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {"layer_types": ["linear_attention"] * 4}),
        ("Qwen3Moe", {"first_k_dense_replace": 2}),
        ("DeepseekV3", {"decoder_sparse_step": 2, "mlp_only_layers": [2]}),
    ],
)
def test_a_key_that_another_family_reads_is_no_error(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    check_config(bridge(tmp_path, name, **changes))


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [3]}])
def test_experts_in_other_layers_are_another_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What the config says of its layers is compared with what the provider has."""
    changed = bridge(tmp_path, "Qwen3Moe", **changes)
    provider = changed.to_megatron_provider(load_weights=False)
    provider.moe_layer_freq = 1
    found = list(problems(changed.hf_pretrained, provider, FAMILIES["qwen3_moe"]))
    assert len(found) == 1 and found[0].startswith("layers with experts is")


def test_vendors_key_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers doesn't read changes nothing."""
    check_config(bridge(tmp_path, "Llama", unsloth_fixed=True))
    assert "unsloth_fixed" not in caplog.text


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 reads it from the scaling alone")
@pytest.mark.parametrize("nested", [{}, {"original_max_position_embeddings": 128}])
def test_original_length_beside_the_scaling_goes_first(nested: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 20000.0, **nested}
    provider, config = provider_of("Llama", rope_parameters=rope, original_max_position_embeddings=32)
    torch.testing.assert_close(megatron_rope(provider)[0], transformers_rope(config)[0], rtol=1e-5, atol=0)
