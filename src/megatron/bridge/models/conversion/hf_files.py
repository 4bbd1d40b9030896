# SPDX-License-Identifier: Apache-2.0
"""The files of a local Hugging Face checkpoint: which there have to be, and which tensors they hold."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron.bridge.models.conversion.safetensors_header import DTYPES, in_one_line, is_file, read_header


INDEX = "model.safetensors.index.json"
# The index of the largest models has some MB; more than this is not read into memory.
_MAX_JSON_BYTES = 256 << 20


def check_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor by name, on the meta device."""
    index, single = path / INDEX, path / "model.safetensors"
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise _no_weights(path)
        return _merged({file: headers(file) for file in files})
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files: copy the file again")
    if single.is_file() and single.name not in weight_map.values():
        raise ValueError(f"{path} holds two sets of weights, {single.name} and those of {INDEX}: remove one of them")
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = path / name
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, expected a file in the same folder: copy the file again")
        # A shard may be a link: the hub's cache is made of them.
        if not is_file(shard):
            raise FileNotFoundError(f"{index} names {name!r}, which is not there: copy the missing shard")
        found = headers(shard)
        missing = {tensor for tensor, file in weight_map.items() if file == name} - found.keys()
        if missing:
            raise ValueError(f"{shard} lacks {min(missing)!r}, which {INDEX} places there: copy the shard again")
        tensors |= found
    return tensors


def headers(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file on the meta device, packed ones as bytes."""
    return {
        name: torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in read_header(file).items()
    }


def read_json(path: Path, without: str) -> dict:
    """Return the object in a JSON file. `without` ends the message that it is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, {without}")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MB, expected a config: copy the file again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({in_one_line(error)}): copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object: copy the file again")
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


def _no_weights(path: Path) -> FileNotFoundError:
    pickles = sorted(path.glob("*.bin"))
    if not pickles:
        return FileNotFoundError(f"{path} has no weights, expected *.safetensors: copy the whole checkpoint")
    return FileNotFoundError(
        f"{path} has {pickles[0].name}, a pickle that could run code, expected *.safetensors: if you trust it, "
        "convert it with save_pretrained of transformers"
    )
