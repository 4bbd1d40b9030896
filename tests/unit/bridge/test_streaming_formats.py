# SPDX-License-Identifier: Apache-2.0
"""The weights of torch and torch_dcp are loaded into a model of one rank."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_checkpoints import args_of, save_ranks, whole_model

from megatron.bridge.models.conversion.streaming.other_formats import load_other_format, other_weights


class Model(torch.nn.Module):
    """A module with the state dict of a Megatron model."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = {name: torch.nn.Parameter(torch.zeros_like(value)) for name, value in weights.items()}

    def state_dict(self, **_) -> dict:
        return self.weights | {"decoder.layers.0.mlp.linear_fc1._extra_state": None}


SIZES = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}


@pytest.mark.parametrize("experts", [0, 4])
def test_the_weights_come_back(experts: int, tmp_path: Path):
    weights = {name: weight.bfloat16() for name, weight in whole_model(experts=experts).items()}
    sizes = SIZES if experts else {name: SIZES[name] for name in list(SIZES)[:2]}
    folder = save_ranks(tmp_path, weights, args_of(experts=experts, **sizes), fused=True)
    # The model's own dtype doesn't matter.
    model = Model(whole_model(experts=experts))
    load_other_format(folder, [model])
    for name, weight in weights.items():
        assert torch.equal(model.weights[name].data, weight), name
    split = {name: value for name, value in other_weights(folder, model.weights).items() if not value.in_files}
    assert all(name.endswith(("linear_proj.weight", "linear_fc2.weight")) for name in split)


@pytest.mark.parametrize("written", ["torch_dcp", "fsdp_dtensor"])
def test_entries_of_a_model(written: str, tmp_path: Path):
    weights = {name: weight.bfloat16() for name, weight in whole_model().items()}
    entries = {f"model.{name}": weight for name, weight in weights.items()}
    entries |= {"args": args_of(ckpt_format=written), "iteration": 1, "optimizer.state.exp_avg": torch.ones(4)}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    model = Model(whole_model())
    if written == "fsdp_dtensor":
        with pytest.raises(
            ValueError, match="has the format fsdp_dtensor, which is not read. Load it with Megatron-LM"
        ):
            load_other_format(tmp_path, [model])
        return
    load_other_format(tmp_path, [model])
    assert all(torch.equal(model.weights[name].data, weight) for name, weight in weights.items())


def test_torch_dist_is_left_to_megatron_core(tmp_path: Path):
    (tmp_path / "metadata.json").write_text("{}")
    assert load_other_format(tmp_path, [Model(whole_model())]) is None


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path):
    folder = save_ranks(tmp_path, whole_model(), args_of(tensor_model_parallel_size=2))
    smaller = {
        name: value[:13] if len(value) == 16 and "qkv" not in name else value for name, value in whole_model().items()
    }
    model = Model(smaller)
    load_other_format(folder, [model])
    assert torch.equal(model.weights["output_layer.weight"].data, smaller["output_layer.weight"])


def test_experts_in_one_tensor(tmp_path: Path):
    weights = whole_model(layers=1, experts=2)
    layer = "decoder.layers.0.mlp.experts"
    grouped = {name: weight for name, weight in weights.items() if "local_experts" not in name}
    for number in (1, 2):
        both = [weights[f"{layer}.local_experts.{expert}.linear_fc{number}.weight"].t() for expert in range(2)]
        grouped[f"{layer}.weight{number}"] = torch.stack(both).view((8, -1) if number == 1 else (-1, 8))
    model = Model(weights)
    load_other_format(save_ranks(tmp_path, grouped, args_of(layers=1, experts=2)), [model])
    for name, weight in weights.items():
        assert torch.equal(model.weights[name].data, weight), name


def test_what_does_not_fit_is_refused(tmp_path: Path):
    weights = whole_model()
    folder = save_ranks(tmp_path, weights, args_of(tensor_model_parallel_size=2))
    for changed, message in (
        ({"decoder.other.weight": torch.ones(1)}, r"lacks decoder\.other\.weight, which the model has"),
        ({"output_layer.weight": None}, r"has output_layer\.weight, which the model lacks"),
        (
            {"output_layer.weight": torch.ones(20, 8)},
            r"has output_layer\.weight in the shape \(16, 8\), the model in \(20, 8\)",
        ),
    ):
        given = {name: value for name, value in (weights | changed).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_other_format(folder, [Model(given)])
    file = folder / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"has other values of decoder\.final_layernorm\.weight than"):
        load_other_format(folder, [Model(weights)])
