# SPDX-License-Identifier: Apache-2.0
"""What lies beside a model's weights goes into a release, byte for byte."""

import os
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import transformers
from test_object_store_writer import object_store  # noqa: F401 - a fixture
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


def publish_model(folder):
    """Make a model as it is published, without a generation config."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(hf_config("llama-3")).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return write(folder, PUBLISHED)


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return publish_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, hf_model):
    root = tmp_path_factory.mktemp("release")
    write(hf_model, OTHERS)
    AutoBridge.import_ckpt(hf_model, root)
    for name in OTHERS:
        (hf_model / name).unlink()
    (hf_model / "original").rmdir()
    return root


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


def test_an_object_store_gets_the_same(root, hf_model, object_store):  # noqa: F811
    url, place = object_store
    AutoBridge.import_ckpt(hf_model, url)
    for folder in ("hf", "tokenizer"):
        assert contents(place / "release" / folder) == contents(root / "release" / folder)


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
    os.mkfifo(source / "preprocessor_config.json")
    (source / "code.py").mkdir()
    assert keep(source, tmp_path / "payload").keys() == {"config.json", "merges.txt", "vocab.json"}
    left_out = " ".join(each for each in caplog.messages if "is left out" in each)
    assert all(name in left_out for name in ("README.md", "LICENSE", "NOTICE", "preprocessor_config.json", "code.py"))


def test_the_largest_are_left_out_and_a_tokenizer_as_a_whole(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_BYTES", 100)
    files = {"config.json": "{}", "vocab.json": "{}", "merges.txt": "x" * 90, "a.py": "y" * 60}
    source = write(tmp_path / "source", files)
    assert keep(source, tmp_path / "payload").keys() == {"config.json", "a.py"}
    (warning,) = [each for each in caplog.messages if "more than" in each]
    assert "merges.txt is left out" in warning


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
    # transformers up to 4 has its own copy.
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    AutoBridge.import_ckpt("owner/tiny", tmp_path / "out")
    for folder in ("hf", "tokenizer"):
        assert contents(tmp_path / "out/release" / folder) == contents(root / "release" / folder)
        assert not any(path.is_symlink() for path in (tmp_path / "out/release" / folder).rglob("*"))
