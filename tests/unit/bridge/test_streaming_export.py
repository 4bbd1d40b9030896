# SPDX-License-Identifier: Apache-2.0
"""An export that streams writes what the export in memory writes, byte for byte, whatever the family."""

import json
import logging

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from random_models import FURTHER, MTP, save_random_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion import model_bridge
from megatron.bridge.models.conversion.streaming import export
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="compares bits of what is computed without an accelerator"
)
INDEX = "model.safetensors.index.json"


def files(folder):
    """The files of a model. The index of an export in memory has its names in any order."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {INDEX: json.loads(found[INDEX])} if INDEX in found else found


def exports(hf, checkpoint, folder):
    """Export in both ways."""
    for streaming in (False, True):
        bridge = AutoBridge.from_hf_pretrained(hf)
        bridge.export_ckpt(checkpoint, folder / str(streaming), show_progress=False, streaming=streaming)
    return files(folder / "True"), files(folder / "False")


@pytest.fixture
def streams(caplog):
    caplog.set_level(logging.WARNING, logger=export.__name__)
    yield
    assert not [line for line in caplog.messages if "not streamed" in line]


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER, MTP])
def test_a_family_streams(tmp_path, monkeypatch, streams, family):
    if family in FURTHER:
        monkeypatch.setitem(FAMILIES, family, FURTHER[family])
    hf = save_random_model(tmp_path / "hf", family)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    streamed, in_memory = exports(hf, tmp_path / "out", tmp_path)
    assert streamed == in_memory
    assert load_file(tmp_path / "True/model.safetensors").keys() == load_file(hf / "model.safetensors").keys()


def test_shards_are_those_of_the_source(tmp_path, streams):
    hf = save_random_model(tmp_path / "hf", "llama-3.2")
    tensors = load_file(hf / "model.safetensors")
    # A tied head that the source stores, too.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    parts = {f"model-0000{at}-of-00002.safetensors": sorted(tensors)[at - 1 :: 2] for at in (1, 2)}
    (hf / "model.safetensors").unlink()
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, hf / file)
    places = {name: file for file, names in parts.items() for name in names}
    (hf / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    streamed, in_memory = exports(hf, tmp_path / "out", tmp_path)
    assert streamed == in_memory
    assert streamed.keys() >= {*parts, INDEX} and streamed[INDEX]["weight_map"] == places


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    hf = save_hf_model(tmp_path_factory.mktemp("hf"), tie_word_embeddings=True)
    AutoBridge.import_ckpt(hf, root := tmp_path_factory.mktemp("root"))
    return hf, root


def computing(self, task, weights, state):
    """A bridge that computes, writes to a copy, and shares one."""
    changed = {name: weight.clone() for name, weight in weights.items()}
    for weight in changed.values() if "layernorm" in task.global_param_name else ():
        weight += 1
    return {name: weight * 2 if "proj" in name else weight for name, weight in changed.items()}


def test_what_a_bridge_computes_is_computed_when_it_is_written(release, tmp_path, streams, monkeypatch):
    monkeypatch.setattr(model_bridge.MegatronModelBridge, "maybe_modify_converted_hf_weight", computing)
    monkeypatch.setattr(
        "megatron.bridge.models.llama.llama_bridge.LlamaBridge.maybe_modify_converted_hf_weight", computing
    )
    streamed, in_memory = exports(*release, tmp_path)
    assert streamed == in_memory
    assert not torch.equal(
        *(load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (release[0], tmp_path / "True"))
    )


def test_most_of_a_model_is_neither_computed_nor_in_memory(release):
    plan = accelerator.with_process_group(export.plan_export)
    tensors = plan(AutoBridge.from_hf_pretrained(release[0]), release[1]).streamed_tensors
    assert tensors and all(isinstance(tensor, PiecewiseTensor) and tensor.in_files for tensor in tensors.values())


@pytest.mark.parametrize(
    "name, reason",
    [
        ("stream_weights_megatron_to_hf", "its bridge has an export of its own"),
        ("build_conversion_tasks", "its mappings need weights (ZeroDivisionError: division by zero)"),
    ],
)
def test_what_does_not_stream_is_exported_in_memory(release, tmp_path, caplog, monkeypatch, name, reason):
    caplog.set_level(logging.WARNING, logger=export.__name__)
    method, calls = getattr(model_bridge.MegatronModelBridge, name), []

    def once(*args, **kwargs):
        calls.append(1)
        return method(*args, **kwargs) if len(calls) > 1 or name.startswith("stream") else 1 / 0

    monkeypatch.setattr("megatron.bridge.models.llama.llama_bridge.LlamaBridge." + name, once, raising=False)
    AutoBridge.from_hf_pretrained(release[0]).export_ckpt(release[1], tmp_path / "hf", show_progress=False)
    (line,) = (line for line in caplog.messages if "not streamed" in line)
    assert f"is exported in memory, not streamed: {reason}. It takes about 0 MB of memory" in line
    assert load_file(tmp_path / "hf/model.safetensors").keys() == load_file(release[0] / "model.safetensors").keys()
