# SPDX-License-Identifier: Apache-2.0
"""Any range of any pieces, in blocks of any size."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


SIZE = 200


@given(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(1, 500), st.lists(st.integers(0, SIZE), max_size=9))
def test_a_range_is_cut_out_of_the_pieces(start, length, size, cuts):
    whole = torch.arange(SIZE, dtype=torch.float32)
    edges = [0, *sorted(cuts), SIZE]
    pieces = [PiecewiseTensor.wrap(whole[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    length = min(length, SIZE - start)
    blocks = [block.clone() for block in torch.cat(pieces).range(start, [length]).blocks(size)]
    assert all(block.nbytes <= max(size, 4) for block in blocks)
    assert torch.equal(torch.cat([torch.empty(0), *blocks]), whole[start : start + length])
