# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints that `import_ckpt` refuses: one line each, and nothing at the target."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from test_hf_files import SHARD, rewrite, truncate
from tiny_models import save_hf_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.hf_checkpoint import check_hf_checkpoint, local_path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of two shards with an index."""
    folder = save_hf_model(tmp_path_factory.mktemp("sound"))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# name: (what is done to a sound checkpoint, error, part of its message)
BROKEN = {
    "no config": (lambda hf: (hf / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "config cut short": (lambda hf: truncate(hf / "config.json", 40), ValueError, "config.json is not JSON"),
    "config a list": (
        lambda hf: (hf / "config.json").write_text("[]"),
        ValueError,
        "holds a list, expected an object",
    ),
    "no weights": (lambda hf: [p.unlink() for p in hf.glob("model*")], FileNotFoundError, "has no weights"),
    "shard missing": (lambda hf: (hf / SHARD).unlink(), FileNotFoundError, f"names {SHARD!r}, which is not there"),
    "tokenizer too large": (
        lambda hf: rewrite(hf / "config.json", lambda config: config.update(vocab_size=299)),
        ValueError,
        "token 299, the embedding has 299 rows",
    ),
    "added token too large": (
        lambda hf: rewrite(
            hf / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder={"384": {"content": "x"}})
        ),
        ValueError,
        "token 384, the embedding has 384 rows",
    ),
    "tokenizer cut short": (
        lambda hf: truncate(hf / "tokenizer.json", 40),
        ValueError,
        "tokenizer.json can't be read",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_and_leaves_nothing(sound, tmp_path, name):
    break_it, error, message = BROKEN[name]
    hf = tmp_path / "hf"
    shutil.copytree(sound, hf)
    break_it(hf)
    with pytest.raises(error) as caught:
        AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "a/b/c"])
def test_a_missing_path_is_refused(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="does not exist: pass the folder"):
        AutoBridge.import_ckpt(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_refused(sound, tmp_path):
    with pytest.raises(NotADirectoryError, match="is a file: pass the folder"):
        AutoBridge.import_ckpt(sound / "config.json", tmp_path / "out")


def test_a_target_that_is_a_file_is_refused(sound, tmp_path):
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(NotADirectoryError, match="is a file, expected a directory"):
        AutoBridge.import_ckpt(sound, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "theirs"


def test_a_pipeline_of_diffusers_gets_the_error_that_its_converters_expect(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="Failed to load configuration"):
        AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_transformers_maps_are_no_error(tmp_path):
    """transformers knows this model's `visual` as `model.visual`, and saves it as it was published."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2, "depth": 1}
    config = Qwen2_5_VLConfig(text_config=text | {"intermediate_size": 32, "vocab_size": 64}, vision_config=vision)
    hf = tmp_path / "hf"
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(hf)
    assert any(name.startswith("visual.") for name in load_file(hf / "model.safetensors"))
    check_hf_checkpoint(hf)


def test_a_relative_folder_is_remembered_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("models/llama") == str(tmp_path / "models" / "llama")
    assert local_path("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
