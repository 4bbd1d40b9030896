# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of `--ckpt-format torch`: the weights of a whole model, split over ranks as Megatron-LM does."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def whole_model(layers: int = 4, experts: int = 0, tied: bool = False) -> dict[str, torch.Tensor]:
    """Return random weights by the names of Megatron Core's own modules: width 8, 4 heads in 2 groups, 16 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"embedding.word_embeddings.weight": draw(16, 8)}
    for layer in (f"decoder.layers.{number}" for number in range(layers)):
        weights[f"{layer}.input_layernorm.weight"] = draw(8)
        weights[f"{layer}.self_attention.linear_qkv.weight"] = draw(16, 8)
        weights[f"{layer}.self_attention.linear_proj.weight"] = draw(8, 8)
        weights[f"{layer}.pre_mlp_layernorm.weight"] = draw(8)
        if experts:
            weights[f"{layer}.mlp.router.weight"] = draw(experts, 8)
        for mlp in [f"experts.local_experts.{number}." for number in range(experts)] or [""]:
            weights[f"{layer}.mlp.{mlp}linear_fc1.weight"] = draw(24, 8)
            weights[f"{layer}.mlp.{mlp}linear_fc2.weight"] = draw(8, 12)
    weights["decoder.final_layernorm.weight"] = draw(8)
    return weights if tied else {**weights, "output_layer.weight": draw(16, 8)}


def args_of(layers: int = 4, experts: int = 0, tied: bool = False, **sizes: Any) -> Namespace:
    """Return Megatron-LM's args of such a model."""
    values = {"num_layers": layers, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 4}
    values |= {"kv_channels": 2, "group_query_attention": True, "num_query_groups": 2, "padded_vocab_size": 16}
    values |= {"max_position_embeddings": 32, "swiglu": True, "num_experts": experts or None}
    values |= {"untie_embeddings_and_output_weights": not tied, "tensor_model_parallel_size": 1}
    values |= {"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1, "params_dtype": torch.float32}
    return Namespace(**values | sizes)


def _part(name: str, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if "norm" in name or "router" in name:
        return weight
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in weight.chunk(2)])
    return weight.chunk(size, int(name.endswith(("linear_proj.weight", "linear_fc2.weight"))))[rank].clone()


def save_ranks(
    folder: Path, weights: dict[str, torch.Tensor], args: Namespace, chunks: int = 1, fused: bool = False, **more: Any
) -> Path:
    """Write a payload.

    Args:
        folder: The payload folder.
        weights: Weights of the whole model.
        args: Megatron-LM's args, with the parallel sizes.
        chunks: Groups of layers of a pipeline stage.
        fused: Use the names of Transformer Engine's modules.
        **more: Further entries of each file.
    """
    sizes = [getattr(args, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert")]
    tensor_size, stages, expert_size = sizes
    expert_tensor = getattr(args, "expert_tensor_parallel_size", tensor_size)
    layers, experts = args.num_layers // stages // chunks, (args.num_experts or 0) // expert_size
    # With one data parallel rank, the ranks of experts are those of the others in another order.
    ranks = range(max(tensor_size, expert_tensor * expert_size))
    for stage in range(stages):
        for rank in ranks:
            tensor, expert = rank % tensor_size, rank // expert_tensor % expert_size
            models: list[dict[str, torch.Tensor]] = [{} for _ in range(chunks)]
            for name, weight in weights.items():
                first, last = name.startswith("embedding"), name.startswith(("decoder.final", "output"))
                chunk, place = (chunks - 1) * last, (stages - 1) * last
                if layer := re.fullmatch(r"decoder\.layers\.(\d+)(\..*)", name):
                    position = int(layer[1]) // layers
                    chunk, place = position // stages, position % stages
                    name = f"decoder.layers.{int(layer[1]) % layers}{layer[2]}"
                part = _part(name, weight, tensor, tensor_size)
                if local := re.fullmatch(r"(.*local_experts\.)(\d+)(\..*)", name):
                    if int(local[2]) // experts != expert:
                        continue
                    name = f"{local[1]}{int(local[2]) % experts}{local[3]}"
                    part = _part(name, weight, tensor % expert_tensor, expert_tensor)
                if place == stage:
                    models[chunk][_fused(name) if fused else name] = part
                if first and "output_layer.weight" not in weights and stage == stages - 1 > 0:
                    models[-1]["output_layer.weight"] = part
            numbers = [f"{stage:03d}"] * (stages > 1) + [f"{expert:03d}"] * (expert_size > 1)
            file = folder / "_".join([f"mp_rank_{tensor:02d}", *numbers]) / "model_optim_rng.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            named = {"model": models[0]} if chunks == 1 else {f"model{at}": each for at, each in enumerate(models)}
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0, **named, **more}, file)
    return folder


def _fused(name: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return re.sub(r"local_experts\.(\d+)\.(\w+)\.weight", r"\2.weight\1", name)
