# SPDX-License-Identifier: Apache-2.0
"""A tensor made of pieces has the values of an ordinary one, whatever is done to it, and reads none before it must."""

import json
import mmap
import os
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.models.conversion.param_mapping import AutoMapping, RMSNorm2ZeroCenteredRMSNormMapping
from megatron.bridge.models.conversion.piecewise_tensor import (
    IgnoreMeta,
    MappedFile,
    Piece,
    PiecewiseTensor,
    storage_of,
)
from megatron.bridge.models.conversion.quantization_utils import dequantize_fp8_blockwise
from megatron.bridge.models.conversion.streaming_import import _SafetensorsFile


ROWS, COLUMNS = 12, 8


def values(start=0):
    return torch.arange(start, start + ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


class Unread(torch.Tensor):
    """Memory that must not be read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reads the values")


def read(tensor, size=64):
    blocks = [block.clone() for block in tensor.blocks(size)]
    assert all(block.dim() == 1 and block.dtype == tensor.dtype for block in blocks)
    return torch.cat(blocks).view(tensor.shape) if blocks else torch.empty(tensor.shape, dtype=tensor.dtype)


def interleave(a, b):
    """What a mapping does to query and key: heads of one and of the other in turn."""
    heads = [piece for i in range(3) for piece in (a.view(3, 4, COLUMNS)[i : i + 1], b.view(3, 4, COLUMNS)[i : i + 1])]
    return torch.cat(heads).reshape(-1, COLUMNS)


# Done without a value being read.
FREE = {
    "nothing": lambda a, b: a,
    "interleaved": interleave,
    "one below the other": lambda a, b: torch.cat([a, b], dim=0),
    "one below the other, halves": lambda a, b: torch.cat([a, b]).chunk(2)[1],
    "rows": lambda a, b: torch.cat([a[3:5], b[1], a[7]] if a.dim() == 1 else [a[3:5], b[1:2]]),
    "one row": lambda a, b: a[5],
    "split": lambda a, b: b.split([5, 7])[1],
    "unbound": lambda a, b: a.unbind()[2],
    "stacked": lambda a, b: torch.stack([a, b]),
    "cast": lambda a, b: torch.cat([a, b]).to(torch.bfloat16),
    "cast twice": lambda a, b: a.to(torch.bfloat16).float(),
    "moved to the meta device": lambda a, b: on_meta(a),
    "flattened": lambda a, b: b.flatten()[3:50],
    "more dimensions": lambda a, b: a[None].squeeze(0).unsqueeze(-1).contiguous().detach(),
}
COMPUTED = {
    "transposed": lambda a, b: a.t().contiguous(),
    "columns": lambda a, b: a[:, 2:5],
    "every second row": lambda a, b: a[::2],
    "every second element": lambda a, b: b.flatten()[::2],
    "side by side": lambda a, b: torch.cat([a, b], dim=1),
    "summed up": lambda a, b: (a + 1) * b,
    "permuted": lambda a, b: a.view(3, 4, COLUMNS).permute(1, 0, 2).reshape(ROWS, COLUMNS)[2:4],
    "padded": lambda a, b: torch.nn.functional.pad(a, (0, 0, 0, 4)),
    "filled in": lambda a, b: torch.zeros(2 * ROWS, COLUMNS).index_copy_(0, torch.arange(ROWS), a),
    "assigned": lambda a, b: assign(torch.zeros(ROWS, COLUMNS), a),
    "assigned to one of its kind": lambda a, b: assign(torch.empty_like(a), b),
    "changed in place after arithmetic": lambda a, b: (a * 2).add_(b),
    "columns assigned after arithmetic": lambda a, b: assign(a * 2, b[:, 2:5], 2, 5),
    "cloned and changed in place": lambda a, b: a[2:7].clone().sub_(1),
    "cast and added": lambda a, b: a.to(torch.float64) + b,
    "written to another": lambda a, b: torch.add(a, b, out=torch.empty(ROWS, COLUMNS)),
    "computed and moved to the meta device": lambda a, b: on_meta(a + b),
    "computed, cast and moved to the meta device": lambda a, b: on_meta(a + b, dtype=torch.bfloat16),
}


def on_meta(tensor, **kwargs):
    with IgnoreMeta():
        return tensor.to(device="meta", **kwargs)


def assign(target, value, first=0, last=COLUMNS):
    target[:, first:last] = value
    return target


@pytest.mark.parametrize("what", FREE | COMPUTED)
def test_it_has_the_values_of_an_ordinary_tensor(what):
    change = (FREE | COMPUTED)[what]
    expected = change(values(), values(1000))
    result = PiecewiseTensor.wrap(change(PiecewiseTensor.wrap(values()), PiecewiseTensor.wrap(values(1000))))
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(read(result), expected)
    assert torch.equal(result.materialize(), expected)


@pytest.mark.parametrize("what", FREE)
def test_views_read_nothing(what):
    a, b = PiecewiseTensor.wrap(values()), PiecewiseTensor.wrap(values())
    for tensor in (a, b):
        object.__setattr__(tensor.pieces[0], "flat", tensor.pieces[0].flat.as_subclass(Unread))
    result = FREE[what](a, b)
    assert isinstance(result, PiecewiseTensor)
    with pytest.raises(AssertionError, match="reads the values"):
        read(result)


@given(st.integers(0, 2 * ROWS * COLUMNS), st.integers(0, ROWS * COLUMNS), st.integers(1, 500))
def test_a_range_is_cut_out_of_the_pieces(start, length, size):
    whole = interleave(values(), values(1000)).flatten()
    length = min(length, len(whole) - start)
    tensor = interleave(PiecewiseTensor.wrap(values()), PiecewiseTensor.wrap(values(1000)))
    assert torch.equal(read(tensor.range(start, [length]), size), whole[start : start + length])


def test_blocks_are_no_larger_than_asked_for_before_and_after_a_cast():
    for tensor in (PiecewiseTensor.wrap(values()).cast(torch.bfloat16), PiecewiseTensor.wrap(values().bfloat16())):
        for block in tensor.cast(torch.float64).blocks(100):
            assert block.nbytes <= 100


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "values"
    with path.open("wb") as file:
        file.write(b"\0" * 100)
        file.write(torch.arange(100_000, dtype=torch.int64).numpy().tobytes())
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = torch.empty(0, dtype=torch.int64).set_(storage_of(memory)[100:])
    return PiecewiseTensor.wrap(flat, MappedFile(storage_of(memory), 100))


def test_pages_that_are_released_are_read_again(mapped):
    once = read(mapped, 10_000)
    assert torch.equal(read(mapped, 33_000), once)
    assert torch.equal(torch.cat([mapped, mapped]).materialize(), torch.cat([once, once]))


def test_a_mapping_is_a_storage_without_a_warning(mapped):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bytes(mapped.pieces[0].file.storage[108:110]) == b"\x01\0"
            with pytest.raises(UserWarning, match="not writable"):  # as others get it
                torch.frombuffer(mmap.mmap(-1, 1, access=mmap.ACCESS_READ), dtype=torch.uint8)
    finally:
        torch.set_warn_always(False)


def resident_kilobytes(memory):
    """What of a mapping of this process's is in memory."""
    address = storage_of(memory).data_ptr()
    with open("/proc/self/smaps") as file:
        lines = iter(file)
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return int(next(line for line in lines if line.startswith("Rss:")).split()[1])


def test_what_is_read_does_not_stay_in_memory(tmp_path):
    with (tmp_path / "values").open("w+b") as file:
        file.write(bytes(range(256)) * (64 << 12))
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = torch.empty(0, dtype=torch.int32).set_(storage_of(memory))
    tensor = PiecewiseTensor.wrap(flat, MappedFile(storage_of(memory), 0))
    most = max((block.sum(), resident_kilobytes(memory))[1] for block in tensor.blocks(1 << 20))
    assert 1 << 10 <= most <= 8 << 10
    assert resident_kilobytes(memory) <= 4 << 10


WRITES = {
    "a file": lambda a: a.add_(1),
    "rows": lambda a: a[3:7].zero_(),
    "columns": lambda a: assign(a, 0, 2, 5),
    "rows of columns": lambda a: a[:, 2:5][1:3].zero_(),
    "its transposition": lambda a: a.t().mul_(2),
    "what a cast has yet to read": lambda a: a.to(torch.float64).mul_(2),
    "data": lambda a: setattr(a, "data", a.data.sub_(1)),
    "out": lambda a: torch.add(torch.ones(ROWS, COLUMNS), 1, out=a),
    "all of a list": lambda a: torch._foreach_add_([torch.ones(ROWS, COLUMNS), a], 1),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_write_that_would_be_lost_is_refused(what):
    tensor = PiecewiseTensor.wrap(values())
    with pytest.raises(NotImplementedError, match="import with streaming=False"):
        WRITES[what](tensor)
    assert torch.equal(tensor.materialize(), values())


def test_out_is_what_is_returned():
    out = torch.empty(ROWS, COLUMNS)
    assert torch.mul(PiecewiseTensor.wrap(values()), 2, out=out) is out
    assert torch.equal(out, values() * 2)


def file_backed(tmp_path, tensor):
    """Return a tensor that lies in a safetensors file behind a header of odd length."""
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}[tensor.dtype]
    path = tmp_path / "model.safetensors"
    entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [0, len(content)]}
    write_header(path, entry)
    with path.open("ab") as file:
        file.write(content)
    return _SafetensorsFile.open(path).tensor("weight")


def write_header(path, entry):
    header = json.dumps({"weight": entry}).encode()
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_mapping_that_changes_its_clone_in_place_leaves_the_file(tmp_path):
    """As Qwen3-Next's norms do."""
    norm = torch.nn.Linear(COLUMNS, 1, device="meta")
    mapping = RMSNorm2ZeroCenteredRMSNormMapping("decoder.final_layernorm.weight", "model.norm.weight")
    AutoMapping.register_module_type("Linear", "replicated")
    weight = torch.arange(COLUMNS, dtype=torch.bfloat16)
    tensor = file_backed(tmp_path, weight)
    with torch.no_grad(), IgnoreMeta():
        converted = mapping.hf_to_megatron(tensor, norm)
    assert torch.equal(PiecewiseTensor.wrap(converted).materialize(), weight - 1)
    assert torch.equal(tensor.materialize(), weight)


def test_a_clone_is_read_once(tmp_path, monkeypatch):
    tensor = file_backed(tmp_path, values())
    read_elements = count_reads(monkeypatch)
    clone = tensor.clone()
    assert type(clone) is torch.Tensor and torch.equal(clone, values())
    assert sum(read_elements) == ROWS * COLUMNS


def count_reads(monkeypatch):
    """Return a list that grows by the elements of each block that is read."""
    counts = []
    blocks = Piece.blocks

    def counted(self, size):
        for block in blocks(self, size):
            counts.append(block.numel())
            yield block

    monkeypatch.setattr(Piece, "blocks", counted)
    return counts


def test_blocks_of_fp8_with_scales_of_their_own_are_read_once(tmp_path, monkeypatch):
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    tensor = file_backed(tmp_path, weight)
    counts = count_reads(monkeypatch)
    assert torch.equal(dequantize_fp8_blockwise(tensor, scales), dequantize_fp8_blockwise(weight, scales))
    assert sum(counts) == weight.numel()


def test_a_file_that_is_larger_than_memory_is_mapped(tmp_path):
    """Without a byte of it on the disk."""
    with open("/proc/meminfo") as file:
        kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in file)}
    rows = 2 * (kilobytes["MemTotal"] + kilobytes["SwapTotal"])
    path = tmp_path / "model.safetensors"
    write_header(path, {"dtype": "BF16", "shape": [rows, 512], "data_offsets": [0, rows * 1024]})
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END) + rows * 1024
        file.seek(end - 2)
        file.write(torch.tensor([3.0], dtype=torch.bfloat16).view(torch.uint8).numpy())
    tensor = _SafetensorsFile.open(path).tensor("weight")
    assert tensor.nbytes == rows * 1024
    assert tensor[-2:].float().sum() == 3
