# SPDX-License-Identifier: Apache-2.0
"""Models in pytorch_model.bin are imported and exported as the same models in safetensors are."""

import json
import logging

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from random_models import save_random_model
from safetensors.torch import load_file
from tiny_models import assert_same_weights, save_hf_model, weights
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.streaming import export, plan


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="compares bits of what is computed without an accelerator"
)
SHARDS = [f"pytorch_model-0000{at}-of-00002.bin" for at in (1, 2)]
INDEX = "pytorch_model.bin.index.json"


def as_torch_files(hf, shards=1, **options):
    """Replace model.safetensors by files of torch.save. Return the tensors."""
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    tied = dict(tensors)
    if json.loads((hf / "config.json").read_text())["tie_word_embeddings"]:
        tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(tied, hf / "pytorch_model.bin", **options)
        return tensors
    parts = {file: sorted(tied)[at::2] for at, file in enumerate(SHARDS)}
    for file, names in parts.items():
        torch.save({name: tied[name] for name in names}, hf / file, **options)
    places = {name: file for file, names in parts.items() for name in names}
    (hf / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return tensors


@pytest.fixture
def streams(caplog):
    for module in (plan, export):
        caplog.set_level(logging.WARNING, logger=module.__name__)
    yield
    assert not [line for line in caplog.messages if "not streamed" in line]


@pytest.mark.parametrize(
    ("family", "shards", "options", "streaming"),
    [
        ("llama-3", 2, {}, True),
        ("llama-3.2", 1, {}, True),
        ("llama-3", 2, {"_use_new_zipfile_serialization": False}, False),
    ],
    ids=["two files", "tied", "before zip"],
)
def test_a_model_in_torch_files_goes_in_and_out(tmp_path, streams, family, shards, options, streaming):
    hf = save_random_model(tmp_path / "hf", family)
    AutoBridge.import_ckpt(hf, tmp_path / "expected")
    tensors = as_torch_files(hf, shards, **options)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert_same_weights(weights(tmp_path / "out/release"), weights(tmp_path / "expected/release"))
    bridge, back = AutoBridge.from_hf_pretrained(hf), tmp_path / "back"
    bridge.export_ckpt(tmp_path / "out", back, show_progress=False, streaming=streaming, strict=True)
    written = sorted(file.name for file in back.iterdir() if "model" in file.name)
    names = [file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for file in SHARDS]
    assert written == (["model.safetensors"] if shards == 1 else [*names, "model.safetensors.index.json"])
    loaded = AutoModelForCausalLM.from_pretrained(back).state_dict()
    assert_same_weights(tensors, {name: loaded[name] for name in tensors})


def test_safetensors_go_before_torch_files(tmp_path):
    hf = save_hf_model(tmp_path / "hf")
    (hf / "pytorch_model.bin").write_bytes(b"nobody reads it")
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert (tmp_path / "out/release").is_dir()


def test_a_tensor_that_is_transposed_in_its_file_is_read(tmp_path, streams):
    hf = save_random_model(tmp_path / "hf", "llama-3")
    AutoBridge.import_ckpt(hf, tmp_path / "expected")
    tensors = as_torch_files(hf)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    torch.save(tensors, hf / "pytorch_model.bin")
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert_same_weights(weights(tmp_path / "out/release"), weights(tmp_path / "expected/release"))


def test_code_and_cut_files_are_refused_before_anything_is_written(tmp_path):
    class Malicious:
        def __reduce__(self):
            return exec, ("raise SystemExit('the file has run code')",)

    hf = save_hf_model(tmp_path / "hf")
    as_torch_files(hf, 2)
    torch.save({"model.norm.weight": Malicious()}, hf / SHARDS[1])
    with pytest.raises(ValueError, match="names exec, which weights don't need"):
        AutoBridge.import_ckpt(hf, tmp_path / "out")
    (hf / SHARDS[1]).write_bytes((hf / SHARDS[0]).read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        AutoBridge.import_ckpt(hf, tmp_path / "out")
    (hf / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} names '{SHARDS[1]}', which is not there"):
        AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
