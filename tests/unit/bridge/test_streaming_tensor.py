# SPDX-License-Identifier: Apache-2.0
"""A tensor made of pieces has the values of an ordinary one, whatever is done to it, and reads none before it must."""

from pathlib import Path

import pytest
import torch

from megatron.bridge.models.conversion.streaming.sources import InFile, InMemory
from megatron.bridge.models.conversion.streaming.tensor import Computing, NeedsValues, PiecewiseTensor, is_piecewise


ROWS, COLUMNS = 12, 8


def values(start=0):
    return torch.arange(start, start + ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


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
}


def assign(target, value, first=0, last=COLUMNS):
    target[:, first:last] = value
    return target


@pytest.mark.parametrize("what", FREE | COMPUTED)
def test_it_has_the_values_of_an_ordinary_tensor(what):
    change = (FREE | COMPUTED)[what]
    expected = change(values(), values(1000))
    with Computing():
        result = change(PiecewiseTensor.wrap(values()), PiecewiseTensor.wrap(values(1000)))
    result = PiecewiseTensor.wrap(result)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(read(result), expected)
    assert torch.equal(result.materialize(), expected)


def unreadable(count=ROWS * COLUMNS):
    return PiecewiseTensor.of(InFile(Path("/nowhere"), 0, torch.float32), [count]).view(ROWS, COLUMNS)


@pytest.mark.parametrize("what", FREE)
def test_views_read_nothing(what):
    result = FREE[what](unreadable(), unreadable())
    assert isinstance(result, PiecewiseTensor) and result.in_files
    with pytest.raises(FileNotFoundError):
        read(result)


@pytest.mark.parametrize("what", COMPUTED)
def test_what_needs_values_reads_none_unless_asked_to(what):
    with pytest.raises(NeedsValues, match="needs the values of a tensor that is not in memory"):
        COMPUTED[what](unreadable(), unreadable())


def test_blocks_are_no_larger_than_asked_for_before_and_after_a_cast():
    for tensor in (PiecewiseTensor.wrap(values()).cast(torch.bfloat16), PiecewiseTensor.wrap(values().bfloat16())):
        for block in tensor.cast(torch.float64).blocks(100):
            assert block.nbytes <= 100


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
    with Computing(), pytest.raises(NotImplementedError, match="import with streaming=False"):
        WRITES[what](tensor)
    assert torch.equal(tensor.materialize(), values())


def test_out_is_what_is_returned():
    out = torch.empty(ROWS, COLUMNS)
    with Computing():
        assert torch.mul(PiecewiseTensor.wrap(values()), 2, out=out) is out
    assert torch.equal(out, values() * 2)


def test_a_clone_has_memory_of_its_own():
    memory = values()
    with Computing():
        clone = PiecewiseTensor.of(InMemory(memory.view(-1)), memory.shape).clone()
    assert type(clone) is torch.Tensor and torch.equal(clone, values())
    assert not clone.add_(1).equal(memory)


def test_a_model_of_piecewise_parameters_is_told_from_others():
    linear = torch.nn.Linear(COLUMNS, ROWS)
    assert not is_piecewise([linear]) and not is_piecewise([])
    linear.weight = torch.nn.Parameter(PiecewiseTensor.wrap(values()), requires_grad=False)
    assert is_piecewise([linear])
