# SPDX-License-Identifier: Apache-2.0
"""A merged adapter is what PEFT merges into its base in float32, bit for bit, cast once."""

import json
import shutil

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from random_models import save_random_model
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_weights, weights
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.adapter import Adapter
from megatron.bridge.release_checkpoint.proof import recorded


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="compares bits of what is computed without an accelerator"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("base"), "llama-3")


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def train(base, folder, dtype=torch.bfloat16, config=LoraConfig, **options):
    """Save an adapter in which every tensor is random. Return the model that PEFT makes of it and its base."""
    torch.manual_seed(2)
    options = {"task_type": "CAUSAL_LM"} | options
    model = get_peft_model(load(base), config(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn_like(parameter) / 4).to(dtype)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(load(base), folder).merge_and_unload()


# name: (options of the adapter, dtype of the adapter, dtype of the import)
ADAPTERS = {
    "queries and values": ({"target_modules": ["q_proj", "v_proj"], "r": 4}, torch.bfloat16, torch.bfloat16),
    "all layers, other ranks, rsLoRA": (
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.o_proj": 2, "down_proj": 6},
            "alpha_pattern": {"k_proj": 32},
        },
        torch.float32,
        torch.bfloat16,
    ),
    "DoRA": ({"target_modules": ["o_proj", "up_proj"], "use_dora": True}, torch.float32, torch.float32),
    "embedding, a whole head, norms": (
        {"target_modules": ["embed_tokens", "gate_proj"], "modules_to_save": ["lm_head", "norm"]},
        torch.float32,
        torch.bfloat16,
    ),
    "fan_in_fan_out": ({"target_modules": ["k_proj"], "fan_in_fan_out": True}, torch.bfloat16, torch.float16),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_adapter_is_pefts(base, tmp_path, name):
    options, own, dtype = ADAPTERS[name]
    merged = train(base, tmp_path / "adapter", own, **options)
    merged.to(dtype).save_pretrained(tmp_path / "merged")
    AutoBridge.import_ckpt(tmp_path / "merged", tmp_path / "expected", torch_dtype=dtype)
    streaming = name != "queries and values"
    AutoBridge.import_ckpt(
        base, tmp_path / "out", adapter=tmp_path / "adapter", torch_dtype=dtype, streaming=streaming
    )
    found = weights(tmp_path / "out/release")
    assert recorded(tmp_path / "out/release").adapter == str(tmp_path / "adapter")
    assert_same_weights(found, weights(tmp_path / "expected/release"))
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_an_adapter_without_safetensors_is_read(base, tmp_path):
    expected = train(base, tmp_path, target_modules=["q_proj"]).state_dict()
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = load(base).state_dict()
    assert torch.equal(Adapter(tmp_path).merged(name, stored[name]), expected[name])


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder, old, new):
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


# name: (what is done to a sound adapter, part of the message)
REFUSED = {
    "no adapter": (shutil.rmtree, "has no adapter_config.json, so it is not a PEFT adapter"),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "another kind": (lambda path: edit(path, peft_type="IA3"), "is an adapter of the type IA3, expected LORA"),
    "PiSSA": (lambda path: edit(path, init_lora_weights="pissa"), 'made with init_lora_weights="pissa"'),
    "LoRA bias": (lambda path: edit(path, lora_bias=True), "made with lora_bias=true, which is not merged here"),
    "experts": (lambda path: edit(path, target_parameters=["a.b"]), "made with target_parameters="),
    "another base": (lambda path: rename(path, "layers.1", "layers.7"), "adapts 'model.layers.7.self_attn.q_proj"),
    "not of a model": (lambda path: rename(path, "base_model.model.", ""), "names that begin with base_model.model."),
    "half of a layer": (lambda path: rename(path, "0.self_attn.q_proj.lora_B", "0.self_attn.v_proj.lora_B"), "only"),
    "another rank": (lambda path: edit(path, r=3), "doesn't fit model.layers.0.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(base, tmp_path, name):
    spoil, message = REFUSED[name]
    train(base, tmp_path / "adapter", target_modules=["q_proj"])
    spoil(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        AutoBridge.import_ckpt(base, tmp_path / "out", adapter=tmp_path / "adapter", verify=False)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_shared_embedding_is_refused(tmp_path):
    base = save_random_model(tmp_path / "base", "llama-3.2")
    train(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(
        ValueError, match="adapts 'model.embed_tokens.weight', which the embedding and the head of .* share"
    ):
        AutoBridge.import_ckpt(base, tmp_path / "out", adapter=tmp_path / "adapter")


def test_other_kinds_of_adapters_are_refused(base, tmp_path):
    options = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    train(base, tmp_path / "adapter", config=IA3Config, **options)
    with pytest.raises(ValueError, match="is an adapter of the type IA3, expected LORA"):
        AutoBridge.import_ckpt(base, tmp_path / "out", adapter=tmp_path / "adapter")
