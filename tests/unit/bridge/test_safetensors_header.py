# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file says what the file holds and where, or the file is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.safetensors_header import DTYPES, StoredTensor, read_header


@pytest.mark.parametrize("name", DTYPES)
def test_each_tensor_lies_where_the_header_says(tmp_path, name):
    dtype = DTYPES[name]
    values = torch.arange(6).view(2, 3).to(dtype)
    tensors = {"a": torch.ones(5, dtype=dtype), "b": values, "none": torch.empty(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "file")
    header = read_header(tmp_path / "file")
    stored = header["b"]
    assert header.keys() == {"a", "b", "none"}
    assert (stored.dtype, stored.shape, stored.numel, header["none"].numel) == (name, (2, 3), 6, 0)
    content = (tmp_path / "file").read_bytes()[stored.start : stored.stop]
    assert content == values.view(torch.uint8).numpy().tobytes()


def test_metadata_is_no_tensor(tmp_path):
    save_file({"a": torch.ones(5)}, tmp_path / "file", metadata={"format": "pt"})
    assert list(read_header(tmp_path / "file")) == ["a"]


def write(path, header, size):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("ab") as file:
        file.truncate(8 + len(text) + size)
    return 8 + len(text)


def test_a_dtype_that_pytorch_lacks_is_told_by_its_name(tmp_path):
    data = write(tmp_path / "file", {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, 4)
    assert read_header(tmp_path / "file") == {"a": StoredTensor("F4", (2, 4), data, data + 4)}


def test_a_file_may_be_larger_than_memory(tmp_path):
    with open("/proc/meminfo") as file:
        kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in file)}
    size = (kilobytes["MemTotal"] + kilobytes["SwapTotal"]) << 11
    write(tmp_path / "file", {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, size)
    assert read_header(tmp_path / "file")["a"].numel == size


@pytest.mark.parametrize("size", [3, 5], ids=["too short", "too long"])
def test_a_file_of_another_size_is_refused(tmp_path, size):
    write(tmp_path / "file", {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, size)
    with pytest.raises(ValueError, match=r"file is truncated or damaged \(.*\): download it again"):
        read_header(tmp_path / "file")


@pytest.mark.parametrize("path", ["folder", "nothing", "x" * 300])
def test_what_is_no_file_is_refused(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is not a file, expected weights"):
        read_header(tmp_path / path)


def test_a_header_is_read_again_only_when_the_file_has_changed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    first = read_header(path)
    assert read_header(str(path)) is first
    save_file({"b": torch.zeros(3)}, path)
    assert list(read_header(path)) == ["b"]
