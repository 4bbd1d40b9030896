# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: their tensors are found without reading values, and nothing that they name is called."""

import zipfile

import pytest
import torch

from megatron.bridge.models.conversion.safetensors_header import DTYPES
from megatron.bridge.models.conversion.torch_files import load, read_torch_file


def tensors():
    torch.manual_seed(1)
    weight = torch.randn(40, 30, dtype=torch.bfloat16)
    return {
        "weight": weight,
        "tied": weight,
        "rows": weight[3:5],
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "mask": torch.ones(3, 3, dtype=torch.bool),
        "transposed": torch.randn(5, 6).t(),
        "negative view": torch._neg_view(torch.randn(9)),
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_values_are_where_the_header_says(tmp_path, is_zip):
    path, saved = tmp_path / "pytorch_model.bin", tensors()
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    found, loaded = read_torch_file(path), load(path)
    assert found.keys() == saved.keys() == loaded.keys()
    in_place = {name for name, stored in found.items() if stored.start >= 0}
    assert in_place == (saved.keys() - {"transposed", "negative view"} if is_zip else set())
    for name, stored in found.items():
        assert stored.shape == saved[name].shape and DTYPES[stored.dtype] == saved[name].dtype
        assert torch.equal(loaded[name], saved[name])
        if name in in_place and stored.numel:
            values = bytearray(path.read_bytes()[stored.start : stored.stop])
            assert torch.equal(torch.frombuffer(values, dtype=saved[name].dtype).view(stored.shape), saved[name])
    assert not is_zip or found["tied"] == found["weight"]


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for value in (1.0, 2.0):
        torch.save({"a": torch.full((3, 2), value).t()}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        assert load(path)["a"].unique().tolist() == [value]


def test_an_old_file_is_read_whole_and_its_size_is_said(tmp_path, caplog):
    torch.save({"a": torch.zeros(1_000_000)}, path := tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    load(path)
    what = "is from before PyTorch's zip format: it is read whole, which takes 4 MB of memory"
    assert f"{path} {what}" in caplog.messages


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file has run code')",)


def compressed(path):
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def cut(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


# name: (what writes the file, part of the message)
BROKEN = {
    "code": (lambda path: torch.save({"a": Malicious()}, path), "names exec, which weights don't need"),
    "code, old": (
        lambda path: torch.save({"a": Malicious()}, path, _use_new_zipfile_serialization=False),
        "names exec, which weights don't need and which could run code: get the model as safetensors",
    ),
    "cut off": (cut, "is truncated or damaged"),
    "compressed": (compressed, "is truncated or damaged (it is compressed)"),
    "a page of HTML": (lambda path: path.write_text("<html>"), "it is not what torch.save writes): download it again"),
    "nothing": (lambda path: path.write_bytes(b""), "is truncated or damaged"),
    "a list": (lambda path: torch.save([torch.zeros(1)], path), "holds a list, expected tensors by name"),
    "nested": (lambda path: torch.save({"model": {"a": torch.zeros(1)}}, path), "holds 'model', a dict, expected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_weights_is_refused_in_one_line(tmp_path, name):
    write, message = BROKEN[name]
    write(path := tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as refused:
        read_torch_file(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
