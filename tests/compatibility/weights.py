# SPDX-License-Identifier: Apache-2.0
"""The weights that a Megatron Core has to have after it has loaded a Llama."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch


def as_megatron(model: Path) -> dict[str, torch.Tensor]:
    """Return a Hugging Face Llama's weights under the names of Megatron Core's local layers, and in their order."""
    from reference import Tensors

    source, config = Tensors(model), json.loads((model / "config.json").read_text("utf-8"))
    weights = {
        "embedding.word_embeddings.weight": source["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": source["model.norm.weight"],
        "output_layer.weight": source["lm_head.weight"],
    }
    for number in range(config["num_hidden_layers"]):
        weights |= _layer(source, number, config["num_key_value_heads"])
    return weights


def _layer(source: Mapping[str, torch.Tensor], number: int, groups: int) -> dict[str, torch.Tensor]:
    def of(name: str) -> torch.Tensor:
        return source[f"model.layers.{number}.{name}.weight"]

    # The rows of each group of queries, then its key's, then its value's.
    heads = [of(f"self_attn.{each}_proj").unflatten(0, (groups, -1)) for each in "qkv"]
    parts = {
        "input_layernorm": of("input_layernorm"),
        "self_attention.linear_qkv": torch.cat(heads, dim=1).flatten(0, 1),
        "self_attention.linear_proj": of("self_attn.o_proj"),
        "pre_mlp_layernorm": of("post_attention_layernorm"),
        "mlp.linear_fc1": torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")]),
        "mlp.linear_fc2": of("mlp.down_proj"),
    }
    return {f"decoder.layers.{number}.{name}.weight": part for name, part in parts.items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that only one side has, or whose type, shape or any bit differs."""
    both = found.keys() & expected.keys()
    same = {name for name in both if _bits(found[name]) == _bits(expected[name])}
    return sorted((found.keys() | expected.keys()) - same)


def _bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()
