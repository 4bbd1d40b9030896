# SPDX-License-Identifier: Apache-2.0
"""Which parts of which ranks' files make the tensors of the whole model."""

from pathlib import Path

import pytest
import torch
from rank_checkpoints import args_of, save_ranks, whole_model

from megatron.bridge.release_checkpoint.ranks import Ranks, UnmergeableRanks


def read(stored) -> torch.Tensor:
    data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, stored.dtype)).view(stored.shape)


def whole(weight) -> torch.Tensor:
    parts = [read(part) for part in weight.parts]
    if weight.gated:
        parts = [part.chunk(2)[half] for half in range(2) for part in parts]
    return torch.cat(parts, weight.dimension) if len(parts) > 1 else parts[0]


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("sizes", "options", "model", "files"),
    [
        ({}, {}, {}, 1),
        (TP2, {}, {}, 2),
        (PP2, {"fused": True}, {}, 2),
        (TP2 | PP2, {}, {"tied": True}, 4),
        (PP2, {"chunks": 2}, {"tied": True}, 2),
        (EP2, {"fused": True}, {"experts": 4}, 2),
        (TP2 | EP2 | {"expert_tensor_parallel_size": 1}, {}, {"experts": 4}, 2),
        (TP2 | EP2 | PP2, {}, {"experts": 4}, 8),
    ],
)
def test_the_whole_model_comes_back(sizes: dict, options: dict, model: dict, files: int, tmp_path: Path):
    saved = whole_model(**model)
    ranks = Ranks(save_ranks(tmp_path, saved, args_of(**model, **sizes), **options))
    assert (len(ranks.files), ranks.missing) == (files, [])
    assert ranks.weights.keys() == saved.keys()
    for name, weight in ranks.weights.items():
        assert weight.shape == tuple(saved[name].shape), name
        assert torch.equal(whole(weight), saved[name]), name
        assert all(torch.equal(read(kept), read(copy)) for kept, copy in weight.copies), name


def test_stages_of_different_length_and_the_flags(tmp_path: Path):
    saved = whole_model(layers=3)
    args = args_of(layers=3, **PP2, decoder_first_pipeline_num_layers=1, transformer_impl="local")
    for stage, layers in enumerate(([0], [1, 2])):
        model = {
            f"decoder.layers.{place}.input_layernorm.weight": saved[f"decoder.layers.{layer}.input_layernorm.weight"]
            for place, layer in enumerate(layers)
        }
        folder = tmp_path / f"mp_rank_00_{stage:03d}"
        folder.mkdir()
        torch.save({"args": args, "model": model}, folder / "model_optim_rng.pt")
    ranks = Ranks(tmp_path)
    assert sorted(ranks.weights) == [f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(3)]
    assert ranks.flags == [
        *("--pipeline-model-parallel-size", "2"),
        *("--decoder-first-pipeline-num-layers", "1"),
        *("--transformer-impl", "local"),
    ]


def test_experts_in_one_tensor(tmp_path: Path):
    saved = whole_model(layers=1, experts=4)
    args = args_of(layers=1, experts=4)
    layer = "decoder.layers.0.mlp.experts"
    grouped = {name: weight for name, weight in saved.items() if "local_experts" not in name}
    for number in (1, 2):
        weights = [saved[f"{layer}.local_experts.{expert}.linear_fc{number}.weight"].t() for expert in range(4)]
        together = torch.stack(weights)
        grouped[f"{layer}.weight{number}"] = together.view(8, -1) if number == 1 else together.view(-1, 8)
    ranks = Ranks(save_ranks(tmp_path, grouped, args))
    assert ranks.weights.keys() == saved.keys()
    for name, weight in ranks.weights.items():
        (part,) = weight.parts
        found = read(part._replace(shape=part.shape[::-1])).t() if part.transposed else read(part)
        assert torch.equal(found, saved[name]), name


def test_what_makes_no_model(tmp_path: Path):
    folder = save_ranks(tmp_path / "a", whole_model(), args_of(**TP2 | PP2))
    (folder / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    (folder / "mp_rank_01_001").rmdir()
    assert Ranks(folder).missing == [f"mp_rank_01_00{stage}/model_optim_rng.pt" for stage in range(2)]

    file = save_ranks(tmp_path / "b", {"mixer.in_proj.weight": torch.ones(4, 4)}, args_of(**TP2))
    with pytest.raises(UnmergeableRanks, match=r"not known how 2 tensor parallel ranks split mixer\.in_proj\.weight"):
        _ = Ranks(file).weights

    file = save_ranks(tmp_path / "c", whole_model(), args_of()) / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"model": {"language_model": {"encoder": {}}}}, file)
    with pytest.raises(UnmergeableRanks, match=r"has a model of megatron\.legacy"):
        _ = Ranks(tmp_path / "c").weights

    file = save_ranks(tmp_path / "d", whole_model(), args_of(**TP2)) / "mp_rank_01" / "model_optim_rng.pt"
    torch.save(torch.load(file, weights_only=False) | {"iteration": 7}, file)
    with pytest.raises(UnmergeableRanks, match="the ranks are of the iterations 0, 7"):
        _ = Ranks(tmp_path / "d").weights
