# SPDX-License-Identifier: Apache-2.0
"""A plan is a model whose parameters say which bytes of the checkpoint make them. None is read until it is saved."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.host.accelerator import with_process_group
from megatron.bridge.models.conversion import model_bridge
from megatron.bridge.models.conversion.streaming.plan import plan_import
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor, is_piecewise


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


plan = with_process_group(plan_import)


def test_parameters_are_pieces_of_the_checkpoint(hf, tmp_path):
    (model,) = plan(AutoBridge.from_hf_pretrained(hf), tmp_path / "out")
    assert is_piecewise([model])
    assert all(isinstance(parameter, PiecewiseTensor) and parameter.in_files for parameter in model.parameters())
    stored = load_file(hf / "model.safetensors")
    embedding = model.embedding.word_embeddings.weight
    assert torch.equal(embedding[3:7].materialize(), stored["model.embed_tokens.weight"][3:7])
    projection = model.decoder.layers[0].mlp.linear_fc1.weight
    gate, up = (stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert len(projection.pieces) == 2
    assert torch.equal(projection.materialize(), torch.cat([gate, up]))


def tasks(change):
    def set_up(monkeypatch):
        build = model_bridge.MegatronModelBridge.build_conversion_tasks
        monkeypatch.setattr(
            model_bridge.MegatronModelBridge,
            "build_conversion_tasks",
            lambda *args, **kwargs: change(build(*args, **kwargs)),
        )

    return set_up


def in_one_buffer(tasks):
    buffer = torch.empty(sum(task.param_weight.numel() for task in tasks), device="meta")
    parts = iter(buffer.split([task.param_weight.numel() for task in tasks]))
    return [replace(task, param_weight=next(parts).view(task.param_weight.shape)) for task in tasks]


REASONS = {
    "word_embeddings.weight is not made of single parameters": tasks(in_one_buffer),
    "its mappings need weights (ZeroDivisionError: division by zero)": tasks(lambda tasks: 1 / 0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_model_that_has_no_plan_is_warned_of(hf, tmp_path, monkeypatch, caplog, reason):
    REASONS[reason](monkeypatch)
    assert plan(AutoBridge.from_hf_pretrained(hf), tmp_path / "out") is None
    (line,) = [record for record in caplog.records if record.name == plan_import.__module__]
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith(f"{hf} is imported in memory, not streamed: ")
    assert reason in line.getMessage()
    size = round((hf / "model.safetensors").stat().st_size / 1e6)
    assert line.getMessage().endswith(f". It takes about {size} MB of memory, the size of its weights.")


def test_a_parameter_that_the_bridge_does_not_map_is_refused(hf, tmp_path, monkeypatch):
    tasks(lambda tasks: tasks[1:])(monkeypatch)
    with pytest.raises(ValueError, match="has no source for 1 parameters of the Megatron model"):
        plan(AutoBridge.from_hf_pretrained(hf), tmp_path / "out")
