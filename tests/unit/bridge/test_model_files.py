# SPDX-License-Identifier: Apache-2.0
"""What lies beside a model's weights goes into a release and comes back at export, byte for byte."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import transformers
from tiny_models import hf_config
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained import model_files


PUBLISHED = {
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1"}\n',
    "special_tokens_map.json": '{"eos_token":"w1",\n "unk_token":"w0"}',
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE.txt": "A license.",
    "README.md": "# Model \u2603",
    "modeling_tiny.py": "raise SystemExit('the code of a model ran')",
    "preprocessor_config.json": "{}",
}
OTHERS = dict.fromkeys(("pytorch_model.bin", "README.gguf", "notes.txt", ".hidden.py", "original/params.json"), "x")
STAYS = set(PUBLISHED) | {"config.json", "tokenizer.json"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside_weights(folder):
    return {name: data for name, data in contents(folder).items() if name in STAYS or not name.startswith("model.")}


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    """A model as it is published, without a generation config."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(hf_config("llama-3")).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder, PUBLISHED)


@pytest.fixture(scope="module")
def root(tmp_path_factory, hf_model):
    root = tmp_path_factory.mktemp("release")
    write(hf_model, OTHERS)
    AutoBridge.import_ckpt(hf_model, root)
    for name in OTHERS:
        (hf_model / name).unlink()
    (hf_model / "original").rmdir()
    return root


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "copy"))


def export(bridge, root, target, **options):
    bridge.export_ckpt(root, target, show_progress=False, **options)
    return target


def test_release_keeps_what_is_named_and_nothing_else(root, hf_model):
    assert contents(root / "release/hf") == {name: (hf_model / name).read_bytes() for name in STAYS}


def test_tokenizer_of_a_release_is_the_sources(root, hf_model):
    tokenizer = contents(root / "release/tokenizer")
    assert tokenizer.keys() == STAYS - {"LICENSE.txt", "README.md", "preprocessor_config.json"}
    assert all((hf_model / name).read_bytes() == data for name, data in tokenizer.items())


@pytest.mark.parametrize("options", [{"streaming": False}, {"torch_dtype": torch.bfloat16}])
def test_every_road_keeps_the_same(root, hf_model, tmp_path, options):
    AutoBridge.import_ckpt(hf_model, tmp_path, **options)
    for folder in ("hf", "tokenizer"):
        assert contents(tmp_path / "release" / folder) == contents(root / "release" / folder)


def test_export_gives_back_the_bytes(root, hf_model, tmp_path):
    assert beside_weights(export(AutoBridge.from_hf_pretrained(hf_model), root, tmp_path)) == beside_weights(hf_model)


def test_kept_files_go_before_the_bridges_and_source_path_before_them(copy, hf_model, tmp_path):
    other = Path(shutil.copytree(hf_model, tmp_path / "other"))
    write(other, {"LICENSE.txt": "Another license."})
    bridge = AutoBridge.from_hf_pretrained(other)
    # As Megatron-LM saves it: beside the release, without a run config.
    without = shutil.ignore_patterns("*.yaml", "hf", "tokenizer")
    trained = Path(shutil.copytree(copy / "release", copy / "iter_0000003", ignore=without))
    assert (export(bridge, copy / "release", tmp_path / "1") / "LICENSE.txt").read_text() == "A license."
    assert (export(bridge, trained, tmp_path / "2") / "LICENSE.txt").read_text() == "A license."
    source = export(bridge, copy / "release", tmp_path / "3", source_path=other)
    assert (source / "LICENSE.txt").read_text() == "Another license."


def test_release_that_keeps_nothing_is_exported_as_transformers_saves_it(copy, hf_model, tmp_path, caplog):
    shutil.rmtree(copy / "release/hf")
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    assert not (export(bridge, copy, tmp_path / "out") / "LICENSE.txt").exists()
    (warning,) = [each for each in caplog.messages if "keeps no files" in each]
    assert "--hf-model" in warning
    assert beside_weights(export(bridge, copy, tmp_path / "again", source_path=hf_model)) == beside_weights(hf_model)


def test_a_slow_tokenizer_stays_slow_and_files_of_others_stay(copy, hf_model, tmp_path):
    (copy / "release/hf/tokenizer.json").rename(copy / "release/hf/tokenizer.model")
    target = write(tmp_path / "out", {"merges.txt": "mine", "notes.txt": "mine"})
    found = contents(export(AutoBridge.from_hf_pretrained(hf_model), copy, target))
    assert "tokenizer.model" in found and "tokenizer.json" not in found
    assert found["merges.txt"] == found["notes.txt"] == b"mine"


def test_weights_in_a_release_never_come_back(copy, hf_model, tmp_path):
    write(copy / "release/hf", {"model.safetensors": "x", "model.safetensors.index.json": "{}", "README.pt": "x"})
    target = export(AutoBridge.from_hf_pretrained(hf_model), copy, tmp_path / "out")
    assert (target / "model.safetensors").stat().st_size > 1000
    assert not (target / "model.safetensors.index.json").exists() and not (target / "README.pt").exists()


def test_generation_config_that_a_caller_has_set_is_exported(root, hf_model, tmp_path):
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    bridge.hf_pretrained.generation_config = transformers.GenerationConfig(max_new_tokens=7)
    target = export(bridge, root, tmp_path)
    assert transformers.GenerationConfig.from_pretrained(target).max_new_tokens == 7
    assert (target / "LICENSE.txt").read_text() == "A license."


# --- hostile and large ----------------------------------------------------------------------------------------------


def keep(source, payload):
    payload.mkdir()
    cfg = SimpleNamespace(model=SimpleNamespace(hf_model_id=str(source)), tokenizer=None)
    model_files.keep_model_files(payload, cfg)
    return contents(payload / "hf") if (payload / "hf").exists() else {}


def test_links_lead_to_files_of_the_model(tmp_path, caplog):
    secret = write(tmp_path, {"id_rsa": "secret", "elsewhere/vocab.json": "{}"}) / "id_rsa"
    source = write(tmp_path / "source", {"config.json": "{}", "deep/merges": "#"})
    (source / "README.md").symlink_to(secret)
    (source / "LICENSE").symlink_to("/dev/zero")
    (source / "NOTICE").symlink_to(source / "NOTICE")
    (source / "merges.txt").symlink_to("deep/merges")
    (source / "vocab.json").symlink_to(tmp_path / "elsewhere/vocab.json")
    os.mkfifo(source / "tokenizer.json")
    (source / "code.py").mkdir()
    assert keep(source, tmp_path / "payload").keys() == {"config.json", "merges.txt", "vocab.json"}
    left_out = " ".join(each for each in caplog.messages if "is left out" in each)
    assert all(name in left_out for name in ("README.md", "LICENSE", "NOTICE", "tokenizer.json", "code.py"))


@pytest.mark.parametrize("hostile", ["file", "folder"])
def test_links_in_a_release_are_not_followed(copy, hf_model, tmp_path, hostile):
    kept = copy / "release/hf"
    if hostile == "folder":
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    else:
        (kept / "LICENSE.txt").rename(kept / "mine")
        (kept / "LICENSE.txt").symlink_to("mine")
    target = export(AutoBridge.from_hf_pretrained(hf_model), copy, tmp_path / "out")
    assert not (target / "LICENSE.txt").exists()


def test_the_largest_are_left_out_and_a_tokenizer_as_a_whole(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_BYTES", 100)
    files = {"config.json": "{}", "vocab.json": "{}", "merges.txt": "x" * 90, "a.py": "y" * 60}
    source = write(tmp_path / "source", files)
    assert keep(source, tmp_path / "payload").keys() == {"config.json", "a.py"}
    (warning,) = [each for each in caplog.messages if "more than" in each]
    assert "merges.txt, vocab.json" in warning


def test_model_id_is_taken_from_the_hubs_cache(hf_model, tmp_path, monkeypatch, root):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache/models--owner--tiny"
    write(cached, {"refs/main": commit})
    for number, (name, data) in enumerate(contents(hf_model).items()):
        blob, link = cached / f"blobs/{number}", cached / "snapshots" / commit / name
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    AutoBridge.import_ckpt("owner/tiny", tmp_path / "out")
    for folder in ("hf", "tokenizer"):
        assert contents(tmp_path / "out/release" / folder) == contents(root / "release" / folder)
        assert not any(path.is_symlink() for path in (tmp_path / "out/release" / folder).rglob("*"))
