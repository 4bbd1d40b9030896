# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that are written block by block are those that safetensors writes."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from megatron.bridge.models.conversion.streaming import execute, safetensors_files
from megatron.bridge.models.conversion.streaming.safetensors_files import save_files, save_like, save_split


TENSORS = {
    "w.1": torch.arange(15, dtype=torch.float32).view(3, 5),
    "w.0": torch.randn(4, 4).bfloat16(),
    "bias": torch.randn(3).half(),
    "scale": torch.tensor(2.5),
    "codes": torch.arange(7, dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 8),
    'a "name" of ümlauts': torch.arange(3),
}
FILES = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(TENSORS)}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    index = {"metadata": {"total_size": 1, "by": "me"}, "weight_map": FILES}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="GB left, expected at least"):
        save_files(TENSORS, FILES, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_bytes_are_those_of_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "BLOCK_BYTES", 8)
    save_files(TENSORS, dict.fromkeys(TENSORS, "sub/a.safetensors"), tmp_path)
    save_file(TENSORS, tmp_path / "expected")
    assert (tmp_path / "sub/a.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_several_threads_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "BYTES_PER_THREAD", 16)
    monkeypatch.setattr(execute, "processors", lambda: 3)
    save_files(TENSORS, dict.fromkeys(TENSORS, "a.safetensors"), tmp_path)
    save_file(TENSORS, tmp_path / "expected")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(("local", "whole"), [("2", False), ("1", True)], ids=["of one host", "of two hosts"])
def test_ranks_divide_tensors_or_files(tmp_path, monkeypatch, local, whole):
    """Here one after the other. Two hosts write no file together."""
    files = {name: "a.safetensors" if at < 7 else "b.safetensors" for at, name in enumerate(TENSORS)}
    written = []
    write = safetensors_files._write
    monkeypatch.setattr(
        safetensors_files, "_write", lambda places, advance: (written.extend(places), write(places, advance))
    )
    monkeypatch.setattr(safetensors_files, "get_world_size_safe", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(safetensors_files, "get_rank_safe", lambda rank=rank: rank)
        save_files(TENSORS, files, tmp_path)
        shares.append([(place.file.name, place.tensor.nbytes) for place in written])
        written.clear()
    assert all(shares) and sum(map(len, shares)) == len(TENSORS)
    first, second = ({file for file, _ in share} for share in shares)
    assert whole == first.isdisjoint(second)
    if not whole:
        first, second = (sum(size for _, size in share) for share in shares)
        assert abs(first - second) <= max(tensor.nbytes for tensor in TENSORS.values())
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: TENSORS[name] for name in TENSORS if files[name] == file}, tmp_path / "expected")
        assert (tmp_path / file).read_bytes() == (tmp_path / "expected").read_bytes()


def test_files_and_index_are_those_of_the_source(tmp_path, source):
    save_like(source, FILES, TENSORS, tmp_path / "out", strict=True)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == FILES
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values()), "by": "me"}
    for file in set(FILES.values()):
        assert load_file(tmp_path / "out" / file).keys() == {name for name in FILES if FILES[name] == file}


def test_a_source_without_tensors_gives_one_file(tmp_path):
    save_like(tmp_path, {}, TENSORS, tmp_path / "out", strict=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("change, message", [({"more": torch.ones(1)}, "'more' is not in"), ({}, "'bias' is only in")])
def test_tensors_that_one_of_them_lacks_stop_a_strict_export(tmp_path, source, caplog, change, message):
    caplog.set_level(logging.WARNING, logger=safetensors_files.__name__)
    tensors = {name: tensor for name, tensor in TENSORS.items() if change or name != "bias"} | change
    with pytest.raises(ValueError, match=message):
        save_like(source, FILES, tensors, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    save_like(source, FILES, tensors, tmp_path / "out", strict=False)
    assert message in caplog.text
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() & FILES.keys()


def test_a_file_outside_of_the_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not in the folder of the model"):
        save_files(TENSORS, {"bias": "../model.safetensors"}, tmp_path / "out")


def test_a_size_divides_a_model_as_transformers_does(tmp_path):
    save_split(TENSORS, tmp_path, max_shard_size=40)
    expected = split_torch_state_dict_into_shards(TENSORS, max_shard_size=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    for file, names in expected.filename_to_tensors.items():
        assert load_file(tmp_path / file).keys() == set(names)
