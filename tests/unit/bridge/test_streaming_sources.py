# SPDX-License-Identifier: Apache-2.0
"""Values in a file are read in blocks, and take the memory of a block."""

import re
from pathlib import Path

import pytest
import torch

from megatron.bridge.models.conversion.streaming.sources import InFile, InMemory


@pytest.fixture
def stored(tmp_path):
    """Return 100,000 integers in a file, behind 101 other bytes."""
    (tmp_path / "values").write_bytes(bytes(101) + torch.arange(100_000).numpy().tobytes())
    return InFile(tmp_path / "values", 101, torch.int64)


@pytest.mark.parametrize(
    ("start", "stop", "length"), [(0, 100_000, 1000), (5, 99_999, 30_000), (7, 8, 5), (3, 3, 1), (10, 20, 10**7)]
)
def test_elements_come_in_blocks(stored, start, stop, length):
    for source in (stored, InMemory(torch.arange(100_000))):
        blocks = [block.clone() for block in source.blocks(start, stop, length)]
        assert all(block.dtype == torch.int64 and len(block) <= length for block in blocks)
        assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *blocks]), torch.arange(start, stop))


def test_a_file_that_is_cut_off_is_an_error(stored):
    blocks = stored.blocks(0, 100_000, 10_000)
    next(blocks)
    with stored.path.open("r+b") as file:
        file.truncate(400_000)
    with pytest.raises(ValueError, match="values ends before byte 800101: download it again"):
        list(blocks)


def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def test_reading_takes_the_memory_of_a_block(tmp_path):
    (tmp_path / "values").write_bytes(bytes(64 << 20))
    source = InFile(tmp_path / "values", 0, torch.int32)
    before = resident()
    most = max((block.sum(), resident())[1] for block in source.blocks(0, 16 << 20, 1 << 18))
    assert most - before < 8 << 20


def test_a_file_may_be_larger_than_memory(tmp_path):
    """It is sparse: not a byte of it is on the disk but the last."""
    memory = sum(
        int(size) << 10 for size in re.findall(r"(?:Mem|Swap)Total:\s+(\d+)", Path("/proc/meminfo").read_text())
    )
    with (tmp_path / "values").open("wb") as file:
        file.seek(2 * memory)
        file.write(b"\3")
    source = InFile(tmp_path / "values", 1, torch.uint8)
    assert torch.cat(list(source.blocks(2 * memory - 2, 2 * memory, 10))).tolist() == [0, 3]
