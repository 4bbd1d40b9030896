# SPDX-License-Identifier: Apache-2.0
"""The files of a local Hugging Face checkpoint: which there have to be, and which tensors they hold."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.safetensors_header import (
    DTYPES,
    StoredTensor,
    in_one_line,
    is_file,
    read_header,
)


INDEX = "model.safetensors.index.json"
_SAFETENSORS = ("model.safetensors", INDEX)
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The index of the largest models has some MB; more than this is not read into memory.
_MAX_JSON_BYTES = 256 << 20


def weight_names(path: Path) -> tuple[str, str]:
    """Return the names that the single file of weights and the index of several files would have.

    safetensors go before files of `torch.save`, as in transformers (`_get_resolved_checkpoint_files` of 5.12).
    """
    if any((path / name).is_file() for name in _SAFETENSORS) or not any((path / name).is_file() for name in _TORCH):
        return _SAFETENSORS
    return _TORCH


def check_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor by name, on the meta device."""
    single, index = (path / name for name in weight_names(path))
    if not index.is_file():
        files = [single] if single.name in _TORCH else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{path} has no weights, expected *.safetensors or pytorch_model.bin: download the whole checkpoint"
            )
        return _merged({file: headers(file) for file in files})
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files: download it again")
    if single.is_file() and single.name not in weight_map.values():
        raise ValueError(
            f"{path} holds two sets of weights, {single.name} and those of {index.name}: remove one of them"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = path / name
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, expected a file in the same folder: download it again")
        # A shard may be a link: the hub's cache is made of them.
        if not is_file(shard):
            raise FileNotFoundError(f"{index} names {name!r}, which is not there: download the missing shard")
        found = headers(shard)
        missing = {tensor for tensor, file in weight_map.items() if file == name} - found.keys()
        if missing:
            raise ValueError(f"{shard} lacks {min(missing)!r}, which {index.name} places there: download it again")
        tensors |= found
    return tensors


def headers(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of weights on the meta device, packed ones as bytes."""
    return {
        name: torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in read_file(file).items()
    }


def read_file(file: Path) -> Mapping[str, StoredTensor]:
    """Return what a file of weights says of its tensors: a safetensors file, or one of `torch.save`."""
    return torch_files.read_torch_file(file) if file.suffix == torch_files.SUFFIX else read_header(file)


def read_json(path: Path, without: str) -> dict:
    """Return the object in a JSON file. `without` ends the message that it is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, {without}")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MB, expected a config: download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({in_one_line(error)}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object: download it again")
    return content


def some(names: Iterable[str]) -> str:
    """Return the first of some names, quoted, and how many more there are."""
    first, *others = sorted(names)
    return f"{first!r} and {len(others)} more" if others else repr(first)


def _merged(files: dict[Path, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of several files without an index, of which no two hold the same one."""
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for file, found in files.items():
        if twice := found.keys() & tensors.keys():
            name = min(twice)
            raise ValueError(
                f"{file.parent} holds {name!r} twice, in {places[name]} and {file.name}: remove one of the two sets "
                "of weights"
            )
        tensors |= found
        places |= dict.fromkeys(found, file.name)
    return tensors
