# SPDX-License-Identifier: Apache-2.0
"""Releases of before imports were accounted for are doubted where their source says why."""

import json
from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint import proof
from megatron.bridge.release_checkpoint.doubts import doubts


HEADER = json.dumps({"lm_head.weight": {}}).encode()
# name: (config.json, what is doubted)
SOURCES = {
    "plain": ({"architectures": ["LlamaForCausalLM"]}, ""),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "the source is quantized (gptq)"),
    "DeepSeek": ({"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}, ""),
    "tied": ({"tie_word_embeddings": True}, "the source has tied embeddings and a 'lm_head.weight' of its own"),
    "dense layers": (
        {"model_type": "qwen3_moe", "mlp_only_layers": [0], "decoder_sparse_step": 1},
        "config.json has mlp_only_layers [0], which earlier imports dropped",
    ),
    "windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "rope_scaling": None},
        "config.json has use_sliding_window true, which earlier imports dropped",
    ),
    "RoPE": (
        {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        'config.json scales RoPE by "dynamic", which earlier imports dropped',
    ),
    "nonsense": ({"architectures": {}, "quantization_config": {"quant_method": []}}, "the source is quantized ([])"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_release_is_doubted_until_it_is_accounted_for(tmp_path: Path, name: str) -> None:
    config, expected = SOURCES[name]
    source, payload = tmp_path / "source", tmp_path / "release"
    source.mkdir()
    payload.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER)
    (payload / "run_config.yaml").write_text(f"model:\n  hf_model_id: {source}\n")
    found = doubts(payload)
    assert [line.split(", and this import did not")[0] for line in found] == ([expected] if expected else [])
    proof.record(payload)
    assert doubts(payload) == []


def test_what_is_no_release_is_not_doubted(tmp_path: Path) -> None:
    assert doubts(tmp_path) == []
