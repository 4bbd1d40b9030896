# SPDX-License-Identifier: Apache-2.0
"""An import accounts for each tensor of the checkpoint and each parameter of the model, or refuses."""

import logging
from contextlib import suppress

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from test_quantized import rewrite
from tiny_models import FAMILIES, save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.release_checkpoint import proof


LAYER = "model.layers.1"
HEAD, EMBEDDING, LAST = "lm_head.weight", "model.embed_tokens.weight", "model.layers.2"
# name: (family, what its bridge has no mapping for, how many parameters have no source, the first of them)
WITHOUT_SOURCE = {
    "routers": ("qwen3-moe", "router", 2, "decoder.layers.0.mlp.router.weight"),
    "experts": ("qwen3-moe", "experts", 16, "decoder.layers.0.mlp.experts."),
    "norms of the heads": ("qwen3", "q_layernorm", 2, "decoder.layers.0.self_attention.q_layernorm.weight"),
    "biases of attention": ("qwen2", "linear_qkv.bias", 2, "decoder.layers.0.self_attention.linear_qkv.bias"),
}
# name: what is done to the tensors of a Llama
NOT_NEEDED = {
    "rotary frequencies": lambda tensors: tensors.update({f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    "a causal mask": lambda tensors: tensors.update({f"{LAYER}.attn.bias": torch.ones(1, 1, 8, 8)}),
    "positions": lambda tensors: tensors.update({"model.position_ids": torch.arange(8)}),
}


@pytest.fixture(autouse=True)
def without_the_check_of_the_config(monkeypatch):
    """It refuses some of these models before they are accounted for."""
    with suppress(ImportError):
        monkeypatch.setattr("megatron.bridge.models.conversion.config_check.check_config", lambda *_: None)


class Loaded(Exception):
    """Ends an import once the weights are there."""


def import_into_nan(monkeypatch, hf):
    """Import in memory with NaN in every parameter; returns what of the checkpoint would still have some."""
    load = MegatronModelBridge.load_weights_hf_to_megatron

    def load_weights(self, hf_pretrained, model, **options):
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.fill_(torch.nan)
        load(self, hf_pretrained, model, **options)
        state_dict = model[0].sharded_state_dict()
        apply_factories(state_dict)
        entries = [each for each in nested_values(state_dict) if isinstance(each, ShardedTensor)]
        raise Loaded([each.key for each in entries if each.data.isnan().any()])

    with monkeypatch.context() as patch, pytest.raises(Loaded) as caught:
        patch.setattr(MegatronModelBridge, "load_weights_hf_to_megatron", load_weights)
        AutoBridge.import_ckpt(hf, hf / "out", streaming=False)
    return caught.value.args[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_merely_allocated(tmp_path, monkeypatch, family):
    assert import_into_nan(monkeypatch, save_hf_model(tmp_path / "hf", family)) == []


@pytest.mark.parametrize("name", WITHOUT_SOURCE)
def test_a_parameter_without_a_source_is_refused_in_any_case(tmp_path, monkeypatch, name):
    family, unknown, count, first = WITHOUT_SOURCE[name]
    hf = save_hf_model(tmp_path / "hf", family)
    bridge = type(AutoBridge.from_hf_pretrained(hf)._model_bridge)
    known = [each for each in bridge().mapping_registry().mappings if unknown not in each.megatron_param]
    monkeypatch.setattr(bridge, "mapping_registry", lambda self: MegatronMappingRegistry(*known))
    for options in ({}, {"strict": False}, {"streaming": False}):
        with pytest.raises(ValueError, match=f"has no source for {count} parameters of .*, '{first}") as caught:
            AutoBridge.import_ckpt(hf, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_tensor_without_a_place_is_refused_or_told(tmp_path, caplog, streaming):
    hf = save_hf_model(tmp_path / "hf", "qwen3", attention_bias=True)
    message = (
        "has 8 tensors that the Megatron model has no place for, 'model.layers.0.self_attn.k_proj.bias' and 7 more"
    )
    with pytest.raises(ValueError, match=f"{message}: pass strict=False"):
        AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    assert not (tmp_path / "out").exists()
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming, strict=False)
    assert f"{message}: left out" in caplog.text
    assert proof.recorded(tmp_path / "out/release").left_out == [message]


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_no_model_needs_is_left_out(tmp_path, monkeypatch, caplog, name):
    hf = save_hf_model(tmp_path / "hf")
    rewrite(hf, NOT_NEEDED[name])
    assert import_into_nan(monkeypatch, hf) == []
    assert "accounting" not in {record.module for record in caplog.records if record.levelno >= logging.WARNING}


def test_the_head_of_a_tied_model(tmp_path, monkeypatch):
    hf = save_hf_model(tmp_path / "hf", "llama-3.2")
    rewrite(hf, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert import_into_nan(monkeypatch, hf) == []
    rewrite(hf, lambda tensors: tensors.update({HEAD: tensors[HEAD] + 1}))
    with pytest.raises(ValueError, match=f"has a tied embedding and a '{HEAD}' with other values: set tie_word_emb"):
        AutoBridge.import_ckpt(hf, tmp_path / "out")


def test_prediction_layers_that_are_left_out_are_told(tmp_path, monkeypatch, caplog):
    hf = save_hf_model(tmp_path / "hf", "deepseek-v3", num_nextn_predict_layers=0)
    names = ("eh_proj", "enorm", "input_layernorm", "embed_tokens")
    rewrite(hf, lambda tensors: tensors.update({f"{LAST}.{name}.weight": torch.ones(64) for name in names}))
    assert import_into_nan(monkeypatch, hf) == []
    assert "prediction layers are left out, 3 tensors" in caplog.text


def test_prediction_layers_that_are_not_there_are_not_made(tmp_path, monkeypatch, caplog):
    """transformers saves DeepSeek-V3 without them, and with their number in the config."""
    hf = save_hf_model(tmp_path / "hf", "deepseek-v3", num_nextn_predict_layers=1)
    assert import_into_nan(monkeypatch, hf) == []
    assert "no weights for the prediction layers of its config (1)" in caplog.text
