# SPDX-License-Identifier: Apache-2.0
"""Write Hugging Face checkpoints with random weights at the speed of the disk, without holding a tensor in memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.shapes import BYTES_PER_VALUE, Shape, size


SHARD_BYTES = 5 * 10**9

# The safetensors format: 8 bytes with the length, a JSON header, and the tensors, aligned to 8 bytes.
_LENGTH_BYTES = _ALIGNMENT = 8


def write_checkpoint(folder: Path, shape: Shape, shard_bytes: int = SHARD_BYTES) -> None:
    """Write configuration, shards, and index.

    Args:
        folder: The folder of the checkpoint. It is made if it doesn't exist.
        shape: The shape of the model.
        shard_bytes: The most bytes of tensors in a shard, unless a single tensor has more.
    """
    shards = write_plan(folder, shape, shard_bytes)
    noise = _noise()
    for name, tensors in shards.items():
        with (folder / name).open("r+b") as file:
            file.write(_header({tensor: shape.tensors[tensor] for tensor in tensors}))
            for tensor in tensors:
                file.writelines(_values(shape.tensors[tensor], noise))


def write_plan(folder: Path, shape: Shape, shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Write configuration, index, and shards whose tensors are holes of sparse files.

    Returns:
        The names of the tensors of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape.config.save_pretrained(folder)
    split = list(_split(shape.tensors, shard_bytes))
    shards = {f"model-{at:05d}-of-{len(split):05d}.safetensors": tensors for at, tensors in enumerate(split, start=1)}
    index = {
        "metadata": {"total_size": shape.bytes},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file:
            file.write(_header({tensor: shape.tensors[tensor] for tensor in tensors}))
            file.truncate(file.tell() + sum(size(shape.tensors[tensor]) for tensor in tensors))
    return shards


def _split(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    used = 0
    for name, shape in tensors.items():
        if shard and used + size(shape) > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size(shape)
    yield shard


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size(shape)]}
        start += size(shape)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _noise() -> np.ndarray:
    """Return normal values with a standard deviation of 0.02 in bfloat16: the upper halves of float32, for numpy.

    The number of values is prime, so that no two tensors begin alike and no two rows of one are equal. It takes 32 MB.
    """
    values = np.random.default_rng(0).standard_normal(16_777_259, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype("<u2")


def _values(shape: tuple[int, ...], noise: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of one tensor, in pieces of the noise."""
    left = size(shape) // BYTES_PER_VALUE
    start = left % 1_000_003
    while left:
        piece = noise[start : start + left]
        yield piece.data
        left -= len(piece)
        start = 0
