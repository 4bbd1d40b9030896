# SPDX-License-Identifier: Apache-2.0
"""The config of an export is the source's, in its own spelling, with what conversion or training changed."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_models import hf_config
from tokenizers import Tokenizer, models

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained import source_config


TRANSFORMERS_5 = Version(transformers.__version__).major >= 5
LLAMA_3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {"rope_theta": 500000.0, "rope_scaling": LLAMA_3, "torch_dtype": "float32", "a_key_of_nobody": [1]}
SAVED = {"rope_parameters": {**LLAMA_3, "rope_theta": 500000.0}, "dtype": "float32"}
SPELLINGS = [PUBLISHED, pytest.param(SAVED, marks=pytest.mark.skipif(not TRANSFORMERS_5, reason="of transformers 5"))]


def make_model(folder, spelling):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(hf_config("llama-3.1")).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | spelling, indent=4))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module", params=SPELLINGS, ids=["published", "saved"])
def hf_model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("hf"), request.param)


@pytest.fixture(scope="module")
def root(hf_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    AutoBridge.import_ckpt(hf_model, root)
    return root


def export(bridge, root, target, **options):
    bridge.export_ckpt(root, target, show_progress=False, **options)
    return config_of(target)


def test_nothing_changes(hf_model, root, tmp_path):
    export(AutoBridge.from_hf_pretrained(hf_model), root, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (hf_model / "config.json").read_bytes()


def test_dtype_is_that_of_the_weights(hf_model, tmp_path):
    AutoBridge.import_ckpt(hf_model, tmp_path / "out", torch_dtype=torch.bfloat16)
    name = "dtype" if "dtype" in config_of(hf_model) else "torch_dtype"
    config = export(AutoBridge.from_hf_pretrained(hf_model), tmp_path / "out", tmp_path / "hf")
    (dtype,) = {tensor.dtype for tensor in load_file(tmp_path / "hf/model.safetensors").values()}
    assert config == config_of(hf_model) | {name: str(dtype).removeprefix("torch.")}


def test_what_the_bridge_says_otherwise_is_said_in_the_sources_spelling(hf_model, root, tmp_path):
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    config, source = bridge.hf_pretrained.config, config_of(hf_model)
    config.max_position_embeddings = 512
    rope = {**LLAMA_3, "factor": 32.0}
    if TRANSFORMERS_5:
        config.rope_parameters = {**rope, "rope_theta": 1000000.0}
    else:
        config.rope_theta, config.rope_scaling = 1000000.0, rope
    expected = {"rope_theta": 1000000.0, "rope_scaling": rope}
    if "rope_parameters" in source:
        expected = {"rope_parameters": {**rope, "rope_theta": 1000000.0}}
    assert export(bridge, root, tmp_path) == source | expected | {"max_position_embeddings": 512}


def test_both_spellings_of_rope_say_the_same():
    """transformers 5 reads the older one first."""
    linear, plain = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 3.0}
    config = {"rope_theta": 2.0, "rope_scaling": linear, "rope_parameters": {**plain, "rope_theta": 1.0}}
    source_config._apply(config, {"rope_parameters": {**linear, "rope_theta": 2.0}}, {"rope_parameters": plain})
    assert config == {"rope_theta": 3.0, "rope_scaling": None, "rope_parameters": plain}


def test_a_config_that_bridge_made_for_the_checkpoint(hf_model, root, tmp_path):
    if not hasattr(AutoBridge, "from_auto_config"):
        pytest.skip("this Bridge doesn't have it")
    bridge = AutoBridge.from_auto_config(str(root), str(hf_model))
    bridge.hf_pretrained.max_position_embeddings = 512
    assert export(bridge, root, tmp_path) == config_of(hf_model) | {"max_position_embeddings": 512}


def test_the_kept_config_goes_before_that_of_the_bridges_model(hf_model, root, tmp_path):
    other = make_model(tmp_path / "other", PUBLISHED | {"max_position_embeddings": 1024})
    assert export(AutoBridge.from_hf_pretrained(other), root, tmp_path / "1") == config_of(hf_model)
    assert export(AutoBridge.from_hf_pretrained(hf_model), root, tmp_path / "2", source_path=other) == config_of(other)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 100000])
def test_damaged_config_is_told_before_anything_is_written(hf_model, root, tmp_path, text):
    kept = root / "release/hf/config.json"
    whole = kept.read_text()
    kept.write_text(text)
    try:
        with pytest.raises(ValueError, match="release/hf/config.json .*: import the model again"):
            export(AutoBridge.from_hf_pretrained(hf_model), root, tmp_path / "hf")
    finally:
        kept.write_text(whole)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("still_quantized", [False, True])
def test_quantization_and_nested_dtypes(tmp_path, still_quantized):
    quantized = {"quantization_config": {"quant_method": "fp8", "dtype": "bfloat16"}}
    own = {"torch_dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "vocab_size": 8}, **quantized}
    (tmp_path / "config.json").write_text(json.dumps(quantized if still_quantized else {}))
    save_file({"a": torch.zeros(9), "b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    bridge = SimpleNamespace(hf_pretrained=transformers.LlamaConfig.from_dict(dict(own)))
    source_config.OwnConfig(json.dumps(own).encode(), tmp_path).give_back(bridge)
    expected = {"torch_dtype": "float32", "text_config": {"torch_dtype": "float32", "vocab_size": 8}}
    assert config_of(tmp_path) == expected | (quantized if still_quantized else {})
