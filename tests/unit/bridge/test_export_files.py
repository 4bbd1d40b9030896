# SPDX-License-Identifier: Apache-2.0
"""What a release has kept comes back at export, byte for byte, and nothing that transformers makes up."""

import shutil
from pathlib import Path

import pytest
import transformers
from test_model_files import STAYS, contents, publish_model, write

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.model_files import TOKENIZER, has_one_of, names_in


def beside_weights(folder):
    return {name: data for name, data in contents(folder).items() if name in STAYS or not name.startswith("model.")}


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return publish_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, hf_model):
    AutoBridge.import_ckpt(hf_model, root := tmp_path_factory.mktemp("release"))
    return root


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "copy"))


def export(bridge, root, target, **options):
    bridge.export_ckpt(root, target, show_progress=False, **options)
    return target


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


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_without_a_tokenizer_is_exported_without(hf_model, tmp_path, caplog, kept):
    bare = Path(shutil.copytree(hf_model, tmp_path / "bare", ignore=shutil.ignore_patterns(*TOKENIZER, "*templates")))
    AutoBridge.import_ckpt(bare, tmp_path / "root")
    if not kept:
        shutil.rmtree(tmp_path / "root/release/hf")
    out = export(AutoBridge.from_hf_pretrained(bare), tmp_path / "root", tmp_path / "out")
    assert (out / "config.json").is_file() and not has_one_of(names_in(out), *TOKENIZER)
    assert "has no tokenizer, and the export has none" in caplog.text


def test_what_is_replaced_is_not_loaded(root, hf_model, tmp_path, monkeypatch):
    """A tokenizer or a processor takes seconds."""
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    for name in ("_load_tokenizer", "_load_processor", "_load_image_processor"):
        monkeypatch.delattr(type(bridge.hf_pretrained), name)
    export(bridge, root, tmp_path)
