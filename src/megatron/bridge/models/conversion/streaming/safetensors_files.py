# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files block by block. The bytes are those that `safetensors.torch.save_file` writes."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory

from megatron.bridge.models.conversion.hf_files import INDEX, some
from megatron.bridge.models.conversion.streaming import execute
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.release_checkpoint.target import check_space
from megatron.bridge.utils.common_utils import get_rank_safe, get_world_size_safe


logger = logging.getLogger(__name__)

# As huggingface_hub names the files of a model.
PATTERN = "model{suffix}.safetensors"


class _Place(NamedTuple):
    """Where a tensor goes: `offset` is the position of its first byte in `file`."""

    file: Path
    offset: int
    tensor: PiecewiseTensor


def save_like(
    source: Path, files: Mapping[str, str], tensors: Mapping[str, torch.Tensor], folder: str | Path, strict: bool
) -> None:
    """Write the tensors of a Hugging Face model into the files in which its source has them.

    Args:
        source: The folder of the source.
        files: The names of the source's tensors, each with that of its file. Empty if the source has no tensors.
        tensors: The tensors by name, in memory or piecewise.
        folder: Where the files are written.
        strict: Stop at tensors that one of the two lacks. Otherwise a warning names them.

    Raises:
        ValueError: One of the two lacks tensors, or a file of the source lies elsewhere.
    """
    files = files or dict.fromkeys(tensors, "model.safetensors")
    for found, but in ((tensors.keys() - files.keys(), "not in"), (files.keys() - tensors.keys(), "only in")):
        if found and strict:
            raise ValueError(f"{some(found)} is {but} {source}. Pass strict=False to export what both have.")
        if found:
            logger.warning("%s is %s %s: it is not exported", some(found), but, source)
    kept = {name: files[name] for name in sorted(tensors.keys() & files.keys())}
    save_files(tensors, kept, folder)
    if kept and (source / INDEX).is_file():
        size = sum(tensors[name].nbytes for name in kept)
        metadata = json.loads((source / INDEX).read_text(encoding="utf-8")).get("metadata") or {}
        save_index({**metadata, "total_size": size}, kept, folder, indent=4)


def save_split(tensors: Mapping[str, torch.Tensor], folder: str | Path, max_shard_size: int | str) -> None:
    """Write the tensors of a model into files of at most a size, as `save_pretrained` of transformers divides them.

    Args:
        tensors: The tensors by name, in memory or piecewise.
        folder: Where the files are written.
        max_shard_size: In bytes, or as "5GB". A tensor that is larger has a file of its own.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_size,
    )
    save_files(tensors, split.tensor_to_filename, folder)
    if split.is_sharded:
        save_index(split.metadata, split.tensor_to_filename, folder, indent=2)


def save_files(tensors: Mapping[str, torch.Tensor], files: Mapping[str, str], folder: str | Path) -> None:
    """Write tensors, each into the file that `files` names. Collective: ranks divide them by bytes."""
    check_space(Path(folder), sum(tensors[name].nbytes for name in files))
    contents: dict[str, dict[str, PiecewiseTensor]] = defaultdict(dict)
    for name, file in files.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{file!r} is not in the folder of the model. Download its index again.")
        contents[file][name] = PiecewiseTensor.wrap(tensors[name])
    places = _own(Path(folder), contents)
    sizes = [place.tensor.nbytes for place in places]
    total = sum(sizes)
    threads = min(execute.processors(), 1 + total // execute.BYTES_PER_THREAD)
    jobs = [partial(_write, [places[at] for at in share]) for share in execute.shares(sizes, threads)]
    execute.run(jobs, total, "exporting")
    if dist.is_initialized():
        dist.barrier()


def _own(folder: Path, contents: Mapping[str, Mapping[str, PiecewiseTensor]]) -> list[_Place]:
    """Make the files, and return the tensors that this rank writes.

    Ranks of one host divide the tensors. Those of several hosts divide the files: a network file system may mix up
    what two hosts write to one.
    """
    ranks, rank = get_world_size_safe(), get_rank_safe()
    is_one_host = ranks == 1 or os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
    files = {folder / name: tensors for name, tensors in contents.items()}
    if not is_one_host:
        sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files.values()]
        own = {list(files)[at] for at in execute.shares(sizes, ranks)[rank]}
        files = {file: tensors for file, tensors in files.items() if file in own}
    places = []
    for file, tensors in files.items():
        header, offsets, size = _plan(tensors)
        if rank == 0 or not is_one_host:
            _start(file, header, size)
        places += [_Place(file, offset, tensors[name]) for name, offset in offsets.items()]
    if not is_one_host:
        return places
    if dist.is_initialized():
        dist.barrier()
    return [places[at] for at in execute.shares([place.tensor.nbytes for place in places], ranks)[rank]]


def save_index(metadata: Mapping[str, Any], files: Mapping[str, str], folder: str | Path, indent: int) -> None:
    """Write the index, which says in which file each tensor is. It comes last: no reader finds half a model."""
    if get_rank_safe() != 0:
        return
    Path(folder, INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": files}, indent=indent))


def _plan(tensors: Mapping[str, PiecewiseTensor]) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file, where each tensor goes in it, and its size."""
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, entry in _order(tensors).items():
        tensor = tensors[name]
        header[name] = {**entry, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
    return len(text).to_bytes(8, "little") + text, offsets, start + offset


def _start(file: Path, header: bytes, size: int) -> None:
    """Write the header of a file, and make room for the tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)


def _order(tensors: Mapping[str, PiecewiseTensor]) -> dict[str, dict[str, Any]]:
    """Return what a header says of the tensors, in the order in which safetensors stores them."""
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    data = safetensors.torch.save(empty)
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _write(places: Iterable[_Place], advance: execute.Advance) -> None:
    for file, offset, tensor in places:
        with file.open("r+b", buffering=0) as stream:
            stream.seek(offset)
            for block in tensor.blocks(execute.BLOCK_BYTES):
                values = memoryview(block.contiguous().view(torch.uint8).numpy())
                while values:
                    written = stream.write(values)
                    values = values[written:]
                    advance(written)
