# SPDX-License-Identifier: Apache-2.0
"""Archives are those of `torch.save`, whatever their size."""

import os
import zipfile
import zlib

import pytest
import torch

from megatron.bridge.models.conversion.streaming.archive import Archive
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


def without_values(shape, dtype=torch.bfloat16):
    return PiecewiseTensor((), shape, dtype)


def test_an_item_of_more_than_4_gib_is_a_whole_archive(tmp_path):
    """Its values, but for the last, are the hole of a sparse file."""
    rows, columns = 5 << 12, 1 << 17
    archive = Archive.around(without_values([rows, columns]))
    assert archive.gap == 5 << 30
    last = torch.tensor([3.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    block = bytes(64 << 20)
    checksum = 0
    for _ in range((5 << 30) // len(block) - 1):
        checksum = zlib.crc32(block, checksum)
    checksum = zlib.crc32(block[2:] + last, checksum)
    path = tmp_path / "item"
    with path.open("wb") as file:
        file.write(archive.before)
        file.seek(archive.gap - 2, os.SEEK_CUR)
        file.write(last + archive.after(checksum))
    with zipfile.ZipFile(path) as written:
        entry = written.getinfo("archive/data/0")
        assert (entry.file_size, entry.compress_size, entry.CRC) == (5 << 30, 5 << 30, checksum)
        for name in written.namelist():  # zipfile compares the sums of those that are read to the end
            if name != entry.filename:
                written.read(name)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert (loaded.shape, loaded.dtype) == ((rows, columns), torch.bfloat16)
    assert loaded[-1, -2:].tolist() == [0, 3]


def test_an_item_may_be_larger_than_memory():
    with open("/proc/meminfo") as file:
        kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in file)}
    rows = 2 * (kilobytes["MemTotal"] + kilobytes["SwapTotal"])
    archive = Archive.around(without_values([rows, 512]))
    assert archive.gap == rows * 1024
    assert len(archive.before) + len(archive.after(1)) < 10_000


CHANGES = {
    "a gap of another size": lambda archive, tensor: archive.seek(tensor.nbytes - 1, os.SEEK_CUR),
    "no gap": lambda archive, tensor: archive.write(bytes(tensor.nbytes)),
    "two gaps": lambda archive, tensor: [archive.seek(tensor.nbytes // 2, os.SEEK_CUR) for _ in range(2)],
    "a seek to a place": lambda archive, tensor: archive.seek(tensor.nbytes, os.SEEK_SET),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_torch_save_is_refused(monkeypatch, change):
    monkeypatch.setattr(torch, "save", lambda tensor, file: CHANGES[change](file, tensor))
    with pytest.raises(OSError, match="torch.save has changed.*: import with streaming=False"):
        Archive.around(without_values([5]))


@pytest.mark.parametrize(
    "change",
    [
        lambda after: after[1:],
        lambda after: after.replace(b"archive/data/0", b"archive/data/1"),
        lambda after: after.replace(b"archive/data/0", b"extra archive/data/0"),
    ],
    ids=["descriptor", "name", "entry"],
)
def test_another_directory_is_refused(change):
    archive = Archive.around(without_values([5]))
    archive._after = change(archive._after)
    with pytest.raises(OSError, match="torch.save has changed"):
        archive.after(1)
