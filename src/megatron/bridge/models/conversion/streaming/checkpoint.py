# SPDX-License-Identifier: Apache-2.0
"""The tensors of a distributed checkpoint, as pieces of its files: which bytes make which part of which tensor.

PyTorch's DCP says where each chunk of a tensor lies, and which parts of which chunks make a part of the tensor,
however many ranks saved it. `torch.load` says where the values are in the archive of a chunk. None is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.bridge.models.conversion.streaming.model import CannotStream
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import Piece, PiecewiseTensor


_HINT = "Pass the Hugging Face model that was trained (--hf-model)."


class StreamingLoadStrategy(TorchDistLoadShardedStrategy):
    """Megatron Core's `torch_dist` format, loaded as `PiecewiseTensor`s, whose values are read when they are used."""

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path, *_: Any) -> dict[str, Any]:
        """Return `sharded_state_dict` with a `PiecewiseTensor` for each sharded tensor, and None for other entries."""
        stored = StoredTensors(checkpoint_dir)
        return dict_list_map_outplace(
            lambda entry: stored.part(entry) if isinstance(entry, ShardedTensor) else None, sharded_state_dict
        )


class StoredTensors:
    """The tensors of one payload folder."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._chunks: dict[MetadataIndex, PiecewiseTensor] = {}

    def part(self, wanted: ShardedTensor) -> PiecewiseTensor:
        """Return a part of a tensor, in the shape and dtype of a model's parameter.

        Raises:
            CannotStream: It isn't stored as PyTorch's DCP stores tensors.
            ValueError: The checkpoint has no such tensor, or one of another shape.
        """
        stored = self._metadata.state_dict_metadata.get(wanted.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{self._folder} lacks {wanted.key}, which the model has. {_HINT}")
        if tuple(stored.size) != wanted.global_shape and not wanted.allow_shape_mismatch:
            raise ValueError(
                f"{self._folder} has {wanted.key} in the shape {tuple(stored.size)}, the model in "
                f"{tuple(wanted.global_shape)}. {_HINT}"
            )
        sizes = (1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)
        box = ChunkStorageMetadata(offsets=torch.Size(wanted.global_offset), sizes=torch.Size(sizes))
        tiles = [
            (tuple(item.dest_offsets), self._tile(item))
            for item in create_read_items_for_chunk_list(wanted.key, stored, [box])
        ]
        found = sum(tile.numel() for _, tile in tiles)
        if found != prod(sizes):
            what = f"{found:,} of the {prod(sizes):,} values"
            raise ValueError(f"{self._folder} has {what} that the model's {wanted.key} has. {_HINT}")
        whole = joined(sizes, tiles) if tiles else PiecewiseTensor([], sizes, wanted.dtype)
        return whole.range(0, wanted.local_shape).cast(wanted.dtype)

    def _tile(self, item: ReadItem) -> PiecewiseTensor:
        """Return the part of a chunk that an item reads."""
        chunk = self._chunk(item.storage_index)
        offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
        cut = next((axis for axis, length in enumerate(lengths) if length > 1), 0)
        if lengths[cut + 1 :] != tuple(chunk.shape[cut + 1 :]):
            raise CannotStream(f"{item.storage_index.fqn} is stored in chunks that no rank of this model has")
        start = sum(offset * prod(chunk.shape[axis + 1 :]) for axis, offset in enumerate(offsets))
        return chunk.range(start, lengths)

    def _chunk(self, index: MetadataIndex) -> PiecewiseTensor:
        if index not in self._chunks:
            where = self._metadata.storage_data[index]
            if getattr(where, "transform_descriptors", None):
                raise CannotStream(f"{index.fqn} is stored compressed")
            path = self._folder / where.relative_path
            with path.open("rb") as file:
                tensor = torch.load(self._reader._slice_file(file, where), map_location="meta", weights_only=True)
            self._chunks[index] = saved_tensor(tensor, path, where.offset)
        return self._chunks[index]


def saved_tensor(tensor: Any, path: Path, offset: int = 0) -> PiecewiseTensor:
    """Return a tensor of an archive of `torch.save`, whose values are read when they are used.

    Args:
        tensor: The tensor as `torch.load` returns it with `map_location="meta"`.
        path: The file.
        offset: The position of the archive in the file, in bytes.

    Raises:
        CannotStream: It is another kind of tensor, or its values don't lie one after the other.
    """
    position = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if type(tensor) is torch.Tensor else None
    if not tensor.numel():
        return PiecewiseTensor([], tensor.shape, tensor.dtype)
    if position is None or not tensor.is_contiguous():
        raise CannotStream(f"{path} has tensors that torch saves in another way")
    start = offset + position + tensor.storage_offset() * tensor.itemsize
    return PiecewiseTensor.of(InFile(path, start, tensor.dtype), tensor.shape)


def joined(sizes: Sequence[int], tiles: Sequence[tuple[tuple[int, ...], PiecewiseTensor]]) -> PiecewiseTensor:
    """Return a tensor that consists of tiles, each with its offsets in the tensor."""
    # An axis of length 1 doesn't cut anything.
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    rest = axes[1:]
    if all(tile.shape[axis] == sizes[axis] for _, tile in tiles for axis in rest):
        pieces: list[Piece] = [piece for _, tile in sorted(tiles, key=lambda each: each[0]) for piece in tile.pieces]
        return PiecewiseTensor(pieces, sizes, tiles[0][1].dtype)
    shape = tuple(sizes[axis] for axis in axes)
    flat = [
        (tuple(offsets[axis] for axis in axes), tile.range(0, [tile.shape[axis] for axis in axes]))
        for offsets, tile in tiles
    ]
    return PiecewiseTensor.of(Tiles(shape, tuple(flat)), sizes)


@dataclass(frozen=True, eq=False)
class Tiles:
    """The elements of a tensor whose rows are cut, as by tensor parallelism. Rows are put together when they are read.

    Attributes:
        shape: The shape, of two or more axes.
        tiles: The tiles, each with its offsets.
    """

    shape: tuple[int, ...]
    tiles: tuple[tuple[tuple[int, ...], PiecewiseTensor], ...]

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self.tiles[0][1].dtype

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:  # noqa: D102
        row = prod(self.shape[1:])
        step = max(length // row, 1)
        for top in range(start // row, -(-stop // row), step):
            bottom = min(top + step, -(-stop // row))
            values = self._rows(top, bottom).view(-1)[max(start - top * row, 0) : stop - top * row]
            yield from values.split(length)

    def _rows(self, top: int, bottom: int) -> torch.Tensor:
        rows = torch.empty((bottom - top, *self.shape[1:]), dtype=self.dtype)
        for offsets, tile in self.tiles:
            first, last = max(top, offsets[0]), min(bottom, offsets[0] + tile.shape[0])
            if first < last:
                width = tile.shape[1:]
                part = tile.range((first - offsets[0]) * prod(width), (last - first, *width)).materialize()
                columns = (slice(at, at + size) for at, size in zip(offsets[1:], width, strict=True))
                rows[(slice(first - top, last - top), *columns)] = part
        return rows
