# SPDX-License-Identifier: Apache-2.0
"""Checks of a local Hugging Face checkpoint, made before anything of it is converted or written."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer


logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
# Any of these makes AutoTokenizer find a tokenizer in a folder.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def check_hf_checkpoint(model: str | os.PathLike) -> None:
    """Refuse a local Hugging Face checkpoint that can't be imported. Reads headers and configs, no weights.

    A model ID is left to the hub's own checks.

    Args:
        model: Path of a checkpoint folder, or a model ID.

    Raises:
        FileNotFoundError: The path, its config, its weights or a shard that its index names isn't there.
        NotADirectoryError: The path is a file.
        ValueError: A file is damaged, or the tokenizer has more tokens than the embedding has rows.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if _looks_like_path(str(model)):
            raise FileNotFoundError(f"{model} does not exist: give the folder of a Hugging Face checkpoint")
        return
    if not path.is_dir():
        raise NotADirectoryError(f"{model} is a file: give the folder of a Hugging Face checkpoint")
    config = _read_json(path / "config.json", "it is not a Hugging Face checkpoint: give the folder of one")
    _check_weights(path)
    _check_vocabulary(path, config)


def has_tokenizer(model: str | os.PathLike) -> bool:
    """Return whether a checkpoint comes with a tokenizer. Of a model ID it is taken for granted.

    Args:
        model: Path of a checkpoint folder, or a model ID.

    Returns:
        False for a folder without tokenizer files, which is imported without one.
    """
    path = Path(model).expanduser()
    if not path.is_dir() or any((path / name).is_file() for name in _TOKENIZER_FILES):
        return True
    logger.warning("%s has no tokenizer: the checkpoint will have none, pass --tokenizer-model to Megatron-LM", model)
    return False


def _looks_like_path(model: str) -> bool:
    """Tell a path from a model ID, which is ``name`` or ``owner/name``."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/")


def _read_json(path: Path, without: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, {without}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object: copy the file again")
    return content


def _check_weights(path: Path) -> None:
    index = path / INDEX
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files and not any(path.glob("*.bin")):
            raise FileNotFoundError(f"{path} has no weights, expected *.safetensors: copy the whole checkpoint")
        for file in files:
            _tensor_names(file)
        return
    weight_map = _read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files: copy the file again")
    for name in sorted(set(weight_map.values())):
        shard = path / name
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, expected a file in the same folder: copy the file again")
        if not shard.is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there: copy the missing shard")
        missing = {tensor for tensor, file in weight_map.items() if file == name} - _tensor_names(shard)
        if missing:
            raise ValueError(f"{shard} lacks {min(missing)}, which {INDEX} places there: copy the shard again")


def _tensor_names(file: Path) -> set[str]:
    try:
        # Opening checks the header and that the file is as long as the header says.
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy the file again") from None


def _check_vocabulary(path: Path, config: dict) -> None:
    """Compare the largest token of the tokenizer with the embedding, from the tokenizer's files alone."""
    text_config = config.get("text_config")
    rows = config.get("vocab_size", text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    largest = max(_token_ids(path), default=-1)
    if isinstance(rows, int) and largest >= rows:
        raise ValueError(
            f"the tokenizer of {path} has token {largest}, the embedding has {rows} rows: "
            "use the tokenizer of this model, or resize the embedding"
        )


def _token_ids(path: Path) -> Iterator[int]:
    if (path / "tokenizer.json").is_file():
        try:
            yield from Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab().values()
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(f"{path / 'tokenizer.json'} can't be read ({error}): copy the file again") from None
    for name in ("vocab.json", "added_tokens.json"):
        if (path / name).is_file():
            yield from (token for token in _read_json(path / name, "").values() if isinstance(token, int))
    if (path / "tokenizer_config.json").is_file():
        added = _read_json(path / "tokenizer_config.json", "").get("added_tokens_decoder")
        yield from (int(token) for token in added or () if token.isdecimal())
