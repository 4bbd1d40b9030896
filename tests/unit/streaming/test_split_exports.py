# SPDX-License-Identifier: Apache-2.0
"""What was saved with `--ckpt-format torch` comes back bit for bit, however it was split."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from random_models import save_random_model
from rank_checkpoints import save_ranks
from safetensors.torch import load_file

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.streaming import export
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args


def sizes(tensor: int = 1, pipeline: int = 1, expert: int = 1, expert_tensor: int | None = None) -> dict[str, int]:
    found = {
        f"{kind}_model_parallel_size": size
        for kind, size in zip(("tensor", "pipeline", "expert"), (tensor, pipeline, expert), strict=True)
    }
    return found | {"expert_tensor_parallel_size": expert_tensor or tensor}


def exported(checkpoint: Path, hf: Path, streaming: bool) -> dict[str, torch.Tensor]:
    out = checkpoint.parent / f"exported-{streaming}"
    AutoBridge.from_hf_pretrained(hf).export_ckpt(
        checkpoint, out, show_progress=False, source_path=hf, streaming=streaming
    )
    return load_file(out / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("family", "split", "options"),
    [
        ("llama-3", sizes(tensor=2, pipeline=2), {}),
        ("llama-3.2", sizes(pipeline=2), {"fused": True}),
        ("qwen2", sizes(tensor=2), {"fused": True}),
        ("qwen3-moe", sizes(tensor=2, expert=2, expert_tensor=1), {}),
        ("deepseek-v3", sizes(tensor=2, expert=2, pipeline=2), {}),
    ],
)
def test_a_split_checkpoint_comes_back(
    family: str, split: dict[str, int], options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hf = save_random_model(tmp_path / "hf", family)
    AutoBridge.import_ckpt(hf, tmp_path / "release")
    args = Namespace(**vars(read_megatron_lm_args(tmp_path / "release")) | split)
    (chunk,) = AutoBridge.from_hf_pretrained(hf).load_megatron_model(tmp_path / "release")
    weights = {name: value for name, value in chunk.state_dict().items() if isinstance(value, torch.Tensor)}
    folder = save_ranks(tmp_path / "trained" / "iter_0000007", weights, args, **options)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    monkeypatch.setattr(export.logger, "warning", lambda *line: pytest.fail(str(line)))
    for streaming in (True, False):
        assert_same(exported(folder.parent, hf, streaming), load_file(hf / "model.safetensors"))


def test_what_the_native_converter_of_primus_writes(tmp_path: Path):
    """It saves one rank, with the names of Transformer Engine's modules, as iteration 1 without optimizer.

    The layout of its keys is that of primus/backends/megatron/checkpoint/native_loader_llama.py (August 2026).
    """
    hf = save_random_model(tmp_path / "hf", "llama-3")
    given = load_file(hf / "model.safetensors")
    bridge = AutoBridge.from_hf_pretrained(hf)
    args = megatron_lm_args(bridge.to_megatron_provider(load_weights=False))
    groups, size = args.num_query_groups, args.kv_channels
    model = {
        "embedding.word_embeddings.weight": given["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": given["model.norm.weight"],
        "output_layer.weight": given["lm_head.weight"],
    }
    for layer in range(args.num_layers):
        own, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        query, key, value = (given[f"{theirs}.self_attn.{name}_proj.weight"].chunk(groups) for name in "qkv")
        rows = [part for group in zip(query, key, value, strict=True) for part in group]
        assert key[0].shape[0] == size
        model |= {
            f"{own}.self_attention.linear_qkv.layer_norm_weight": given[f"{theirs}.input_layernorm.weight"],
            f"{own}.self_attention.linear_qkv.weight": torch.cat(rows),
            f"{own}.self_attention.linear_proj.weight": given[f"{theirs}.self_attn.o_proj.weight"],
            f"{own}.mlp.linear_fc1.layer_norm_weight": given[f"{theirs}.post_attention_layernorm.weight"],
            f"{own}.mlp.linear_fc1.weight": torch.cat(
                [given[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            f"{own}.mlp.linear_fc2.weight": given[f"{theirs}.mlp.down_proj.weight"],
            f"{own}.self_attention.linear_qkv._extra_state": None,
        }
    file = tmp_path / "native" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model}
    torch.save(state | {"num_floating_point_operations_so_far": 0}, file)
    (tmp_path / "native" / "latest_checkpointed_iteration.txt").write_text("1")
    assert_same(exported(tmp_path / "native", hf, streaming=True), given)
