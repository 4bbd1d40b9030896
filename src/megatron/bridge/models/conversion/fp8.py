# SPDX-License-Identifier: Apache-2.0
"""Dequantizes FP8 weights while they are read: float32 weight times scale.

A scale belongs to a tensor, a channel (a row), a group of columns or a block. Its shape says which, with the edges of
blocks in config.json. The last block of a row or column may be cut off.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron.bridge.models.conversion.quantized import FLOAT8, UnfitScaleError, is_scale, scale_of
from megatron.bridge.models.conversion.streaming.sources import Source
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


# Edges that are looked for where config.json doesn't say any. No two of them fit a weight that has several blocks.
_EDGES = (128, 64, 256, 32, 512, 16)
_BLOCK = 1 << 18


class Dequantized(Mapping):
    """The tensors of a checkpoint, in which FP8 weights that have scales are float32.

    Args:
        state: The tensors as they are stored: in memory, on the meta device, or as a `PiecewiseTensor`.
        config: The Hugging Face config.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], config: Any = None) -> None:
        self._state = state
        self._config = config

    def __getitem__(self, name: Any) -> Any:
        weight = self._state[name]
        if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOAT8 or is_scale(name):
            return weight
        scale = scale_of(name, self._state)
        return weight if scale is None else dequantize(name, weight, self._state[scale], blocks_of(self._config))

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def dequantize(name: str, weight: torch.Tensor, scale: torch.Tensor, blocks: list[tuple[int, int]]) -> torch.Tensor:
    """Return a weight of FP8 in float32.

    Args:
        name: Its name, for errors.
        weight: The weight, of any shape if the scale is one value, otherwise [rows, columns].
        scale: A value, [rows], [rows, 1], or [rows of blocks, columns of blocks].
        blocks: Edges of the blocks in config.json, rows and columns.

    Returns:
        A tensor of the same kind (in memory, without values, or read in blocks), of the same shape.

    Raises:
        UnfitScaleError: The shape of the scale doesn't fit that of the weight.
    """
    edges = _edges(weight.shape, scale.shape, blocks)
    if edges is None:
        wanted = f" in blocks of {' or '.join(f'{rows}x{columns}' for rows, columns in blocks)}" if blocks else ""
        raise UnfitScaleError(
            f"{name} is FP8 of the shape {tuple(weight.shape)}, and its scale has {tuple(scale.shape)}, expected one "
            f"value, one a row, or one a block{wanted}: download the checkpoint again, or import the unquantized one"
        )
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    columns = weight.shape[-1] if weight.dim() else 1
    if isinstance(weight, PiecewiseTensor):
        (piece,) = weight.pieces
        return PiecewiseTensor.of(Scaled(piece.source, scale, edges, columns, name), weight.shape)
    grid = _Grid.of(scale, edges, columns)
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    flat, stored = result.view(-1), weight.contiguous().view(-1)
    for start in range(0, stored.numel(), _BLOCK):
        block = stored[start : start + _BLOCK]
        flat[start : start + _BLOCK] = grid.scaled(block, start)
    return result


def blocks_of(config: Any) -> list[tuple[int, int]]:
    """Return the edges of blocks that `quantization_config` names, those of compressed-tensors by group of layers."""
    for each in (config, getattr(config, "text_config", None)):
        quantization = getattr(each, "quantization_config", None)
        if quantization is None:
            continue
        values = quantization if isinstance(quantization, dict) else vars(quantization)
        groups = values.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        found = [values.get("weight_block_size"), *(each.get("block_structure") for each in weights if each)]
        return [tuple(edges) for edges in found if isinstance(edges, list | tuple) and len(edges) == 2]
    return []


@dataclass(frozen=True, eq=False)
class _Grid:
    """Scales of a matrix.

    Attributes:
        scale: [rows of blocks, columns of blocks], float32.
        edges: Rows and columns of a block.
        columns: Columns of the matrix.
    """

    scale: torch.Tensor
    edges: tuple[int, int]
    columns: int

    @classmethod
    def of(cls, scale: torch.Tensor, edges: tuple[int, int], columns: int) -> "_Grid":
        """Return the scales of a matrix, which have any of the shapes that `dequantize` takes."""
        values = scale.materialize() if isinstance(scale, PiecewiseTensor) else scale
        return cls(values.float().reshape(-1, values.shape[-1] if values.dim() > 1 else 1), edges, columns)

    def scaled(self, block: torch.Tensor, start: int) -> torch.Tensor:
        """Return a run of elements, from element `start` of the matrix on, times their scales."""
        if self.scale.numel() == 1:
            return block.float() * self.scale.view(())
        first, stop = start // self.columns, -(-(start + block.numel()) // self.columns)
        rows = self.scale[torch.arange(first, stop, device=self.scale.device) // self.edges[0]]
        scales = rows.repeat_interleave(self.edges[1], dim=1)[:, : self.columns].reshape(-1)
        at = start - first * self.columns
        return block.float() * scales[at : at + block.numel()].to(block.device)


@dataclass(frozen=True, eq=False)
class Scaled:
    """The elements of an FP8 matrix times their scales.

    Attributes:
        stored: The matrix.
        scale: Its scales, which are read each time anew, because those of a whole model are many.
        edges: Rows and columns of a block.
        columns: Columns of the matrix.
        name: What it is called.
    """

    stored: Source
    scale: torch.Tensor
    edges: tuple[int, int]
    columns: int
    name: str

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return torch.float32

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:  # noqa: D102
        grid = _Grid.of(self.scale, self.edges, self.columns)
        for block in self.stored.blocks(start, stop, length):
            yield grid.scaled(block, start)
            start += block.numel()


def _edges(weight: torch.Size, scale: torch.Size, blocks: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return rows and columns of a block, None if the scale has no shape that fits."""
    if prod(scale) == 1:
        return max(prod(weight[:-1]), 1), weight[-1] if weight else 1
    if len(weight) != 2:
        return None
    (rows, columns), (down, across) = weight, (*scale, 1)[:2] if len(scale) < 3 else (0, 0)
    if down == rows and across == 1:
        return 1, columns
    groups = [(1, edge) for edge in _EDGES] if down == rows else []
    for edges in blocks or [*((edge, edge) for edge in _EDGES), *groups]:
        if (-(-rows // edges[0]), -(-columns // edges[1])) == (down, across):
            return edges
    return None
