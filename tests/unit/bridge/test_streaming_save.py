# SPDX-License-Identifier: Apache-2.0
"""The writer of the streaming import: archives of any size, threads for the processors that are there."""

import io
import os
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron.bridge.models.conversion.piecewise_tensor import PiecewiseTensor
from megatron.bridge.models.conversion.streaming_import import _LastUsed
from megatron.bridge.training import checkpointing, streaming_save


def without_values(shape, dtype=torch.bfloat16):
    return PiecewiseTensor((), shape, dtype)


@pytest.mark.parametrize("tensor", [torch.arange(10), torch.tensor(3.0), torch.empty(0, 5), torch.ones(2, 3).bool()])
def test_an_archive_is_what_torch_saves(tensor):
    saved, written = io.BytesIO(), io.BytesIO()
    torch.save(tensor, saved)
    streaming_save._write_tensor(written, PiecewiseTensor.wrap(tensor), threading.Event(), lambda written: None)
    assert records(written) == records(saved)


def records(file):
    """Return where each record of an archive lies, and what it holds, but for the one that is a sum of all sums."""
    with zipfile.ZipFile(file) as archive:
        return [
            (entry.filename, entry.header_offset, entry.filename.endswith("serialization_id") or archive.read(entry))
            for entry in archive.infolist()
        ]


def test_an_item_of_more_than_4_gib_is_a_whole_archive(tmp_path):
    """Its values, but for the last, are the hole of a sparse file."""
    rows, columns = 5 << 12, 1 << 17
    archive = streaming_save._Archive.around(without_values([rows, columns]))
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
        file.write(last + archive.end(checksum))
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
    archive = streaming_save._Archive.around(without_values([rows, 512]))
    assert archive.gap == rows * 1024
    assert len(archive.before) + len(archive.end(1)) < 10_000


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
        streaming_save._Archive.around(without_values([5]))


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
    archive = streaming_save._Archive.around(without_values([5]))
    archive.after = change(archive.after)
    with pytest.raises(OSError, match="torch.save has changed"):
        archive.end(1)


@pytest.mark.parametrize(
    ("processors", "ranks", "threads"),
    [(1, None, 1), (4, None, 4), (64, None, 8), (64, "16", 4), (64, "2", 8), (4, "8", 1), (4, "", 4)],
)
def test_threads_are_for_the_processors_of_this_rank(monkeypatch, processors, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert streaming_save._processors() == threads


def test_layers_that_threads_use_in_turn_are_made_once():
    made, held = [], _LastUsed()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def get(pool, key):
            value = pool.submit(held.get, key, lambda: made.append(key) or key.upper()).result()
            assert value == key.upper()

        for _ in range(5):
            get(one, "a")
            get(other, "b")
        assert made == ["a", "b"]
        get(one, "b")
        assert made == ["a", "b"]
        get(one, "c")
        get(other, "c")
        assert made == ["a", "b", "c"]
        assert list(held._values) == ["c"]


def test_other_saves_do_not_depend_on_this_one():
    """It imports private names of torch and Megatron Core, which may be gone in the next release."""
    of_streaming = {id(streaming_save), id(streaming_save.for_streamed_model)}
    assert not of_streaming & {id(value) for value in vars(checkpointing).values()}
