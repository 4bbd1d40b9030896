# SPDX-License-Identifier: Apache-2.0
"""Tensors of a distributed checkpoint are pieces of its files, whichever ranks have saved them."""

from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron.bridge.host.accelerator import with_process_group
from megatron.bridge.host.saving import InProcessSaveStrategy
from megatron.bridge.models.conversion.streaming import sources
from megatron.bridge.models.conversion.streaming.checkpoint import StoredTensors, StreamingLoadStrategy
from megatron.bridge.models.conversion.streaming.model import CannotStream
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


WHOLE = torch.arange(3 * 8 * 6, dtype=torch.float32).view(3, 8, 6)


def saved(folder, *cuts):
    """Save a tensor of three layers in the chunks of ranks that cut it: (axis, number of ranks)."""
    folder.mkdir()
    chunks = [((), WHOLE)]
    for axis, count in cuts:
        chunks = [
            ((*offsets, (axis, at, count)), part)
            for offsets, chunk in chunks
            for at, part in enumerate(chunk.chunk(count, axis))
        ]
    state = {str(at): ShardedTensor.from_rank_offsets("w", part, *where) for at, (where, part) in enumerate(chunks)}
    strategy = InProcessSaveStrategy("torch_dist", 1)
    with_process_group(dist_checkpointing.save)(state, folder, strategy, validate_access_integrity=False)
    return folder


def wanted(layer=1, **changes):
    """A parameter of one layer, as the sharded state dict of a model has it."""
    data = torch.empty(8, 6, device="meta")
    return replace(ShardedTensor.from_rank_offsets("w", data, (0, layer, 3), prepend_axis_num=1), **changes)


@pytest.mark.parametrize(
    "cuts", [[], [(0, 3)], [(1, 2)], [(2, 2)], [(2, 3), (1, 4)], [(0, 3), (1, 2), (2, 2)]], ids=str
)
def test_a_part_is_put_together_from_the_chunks_of_any_ranks(tmp_path, cuts):
    found = StoredTensors(saved(tmp_path / "out", *cuts)).part(wanted())
    assert isinstance(found, PiecewiseTensor) and found.shape == (8, 6)
    assert torch.equal(found.materialize(), WHOLE[1])
    for size in (4, 40, 1 << 20):
        assert torch.equal(torch.cat([block.clone() for block in found.blocks(size)]), WHOLE[1].view(-1))
        rows = found[2:5]
        assert torch.equal(torch.cat([block.clone() for block in rows.blocks(size)]).view(3, 6), WHOLE[1, 2:5])


def test_a_part_is_cast_to_the_dtype_of_the_model(tmp_path):
    data = torch.empty(8, 6, device="meta", dtype=torch.bfloat16)
    found = StoredTensors(saved(tmp_path / "out")).part(wanted(data=data, dtype=torch.bfloat16))
    assert torch.equal(found.materialize(), WHOLE[1].bfloat16())


def test_a_strategy_reads_no_values(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.InFile, "blocks", None)
    found = StreamingLoadStrategy().load({"model": {"a": wanted(0)}}, saved(tmp_path / "out"), "mcore")
    assert found["model"]["a"].in_files


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": "x"}, "lacks x, which the model has"),
        (
            {"global_shape": (4, 8, 6), "axis_fragmentations": (4, 1, 1)},
            r"shape \(3, 8, 6\), the model in \(4, 8, 6\)",
        ),
        ({"global_shape": (5, 8, 6), "global_offset": (4, 0, 0), "allow_shape_mismatch": True}, "0 of the 48 values"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        StoredTensors(saved(tmp_path / "out")).part(wanted(**{"axis_fragmentations": None, **change}))


def test_a_part_that_no_rank_has_saved_in_one_piece_is_not_streamed(tmp_path):
    """It would be read in single values: columns of a chunk."""
    column = replace(
        wanted(),
        data=None,
        local_shape=(8, 3),
        global_shape=(3, 8, 6),
        global_offset=(1, 0, 3),
        axis_fragmentations=None,
    )
    with pytest.raises(CannotStream, match="chunks that no rank"):
        StoredTensors(saved(tmp_path / "out")).part(column)
