# SPDX-License-Identifier: Apache-2.0
"""What the stored weights say of the config of an export: the rows of the vocabulary, and the precision."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from megatron.bridge.models.conversion.hf_checkpoint import token_ids
from megatron.bridge.release_checkpoint import weights
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG
from megatron.bridge.release_checkpoint.payload import Payload


logger = logging.getLogger(__name__)


def follow_rows(config: Any, args: Namespace | None, payload: Payload) -> bool:
    """Give a config the rows that were trained. Rows are left out only if a tokenizer tells that they are padding.

    Args:
        config: The config of the language model, which is changed.
        args: Args of the checkpoint, None if it has none.
        payload: Its facts.

    Returns:
        Whether the config is another now.

    Raises:
        ValueError: A token of the config has no row.
    """
    stored, rows = stored_rows(payload), getattr(config, "vocab_size", None)
    if not stored or not rows or stored == rows:
        return False
    known = _vocabulary_of_run_config(payload.path) or true_vocabulary(args)
    kept = max(rows, known) if known is not None and rows < stored >= known else stored
    if known is None and stored > rows:
        logger.warning(
            "rows %d to %d of the vocabulary go into the export with vocab_size %d: nothing says whether they pad it, "
            "because the tokenizer of the training is not here", rows, stored - 1, stored,
        )  # fmt: skip
    if beyond := _token_beyond(config, kept):
        raise ValueError(
            f"{payload.path} was trained with {kept} rows of the vocabulary, and {beyond} of config.json has none: "
            "pass the model whose tokenizer it was trained with as --hf-model (source_path)"
        )
    config.vocab_size = kept
    return kept != rows


def stored_rows(payload: Payload) -> int | None:
    """Return how many rows the embedding of a payload has, None if there is none or several."""
    shapes = weights.weight_shapes(payload.metadata) if payload.metadata else {}
    found = {shape[0] for name, (shape, _) in shapes.items() if name.endswith("embedding.word_embeddings.weight")}
    return found.pop() if len(found) == 1 else None


def has_prediction_layers(payload: Payload) -> bool:
    """Return whether a payload has layers for multi-token prediction, which a config may name and weights may lack."""
    return any("mtp." in name for name in (weights.weight_shapes(payload.metadata) if payload.metadata else ()))


def follow_precision(payload: Payload, config: Any) -> dict[str, bool]:
    """Return the fields of a model provider with the precision that keeps every weight, and tell it to the config."""
    known = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
    shapes = weights.weight_shapes(payload.metadata) if payload.metadata else {}
    # Vectors are stacked by layer. Those of routers are in float32, whatever the model's dtype.
    shapes = {name: found for name, found in shapes.items() if len(found[0]) > 1 and not name.endswith("expert_bias")}
    stored = {f"torch.{dtype.removeprefix('torch.')}" for _, dtype in shapes.values()}
    stored = {dtype for dtype in stored if dtype in known}
    if not stored:
        return {}
    # Bridge keeps some weights in float32, as routers of ERNIE 4.5, in a model that it saves in another precision.
    saved = _saved_model(payload.path) if len(stored) > 1 else {}
    kept = (dtype for dtype in stored - {"torch.float32"} if saved.get(known[dtype]) is True)
    dtype = stored.pop() if len(stored) == 1 else next(kept, "torch.float32")
    config.dtype = getattr(torch, dtype.removeprefix("torch."))
    return {name: known[dtype] == name for name in ("bf16", "fp16")}


def follow_length(config: Any, args: Namespace | None) -> None:
    """Take a larger context length. Sequences of a fine-tuning are often short, and say nothing of the model."""
    length, known = getattr(args, "max_position_embeddings", None), getattr(config, "max_position_embeddings", None)
    if isinstance(length, int) and isinstance(known, int) and length > known:
        config.max_position_embeddings = length


def true_vocabulary(args: Namespace | None) -> int | None:
    """Return the number of tokens that a training's tokenizer has, None where its args don't say and it is gone.

    Args:
        args: Args of a checkpoint. `vocab_size` is a flag for tokenizers without files, of which "Null" ones add one
            token (core 0.19); others are looked up at `tokenizer_model`, a folder or a name in the hub's cache.
    """
    size, kind = getattr(args, "vocab_size", None), str(getattr(args, "tokenizer_type", None) or "")
    found = [size + kind.startswith("Null")] if isinstance(size, int) else []
    folder = _tokenizer_folder(getattr(args, "tokenizer_model", None))
    if folder is not None:
        found.append(max(token_ids(folder), default=-1) + 1)
    return max(found, default=0) or None


def _tokenizer_folder(model: Any) -> Path | None:
    if not isinstance(model, str) or not model:
        return None
    if Path(model).is_dir():
        return Path(model)
    try:
        cached = try_to_load_from_cache(model, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _vocabulary_of_run_config(payload: Path) -> int | None:
    """Return the vocabulary that Bridge has padded, where it has saved a payload."""
    size = _saved_model(payload).get("vocab_size")
    return size if isinstance(size, int) else None


def _saved_model(payload: Path) -> dict[str, Any]:
    """Return the config of the model that Bridge has saved in a payload."""
    if not (payload / RUN_CONFIG).is_file():
        return {}
    from megatron.bridge.training.utils.checkpoint_utils import read_run_config

    model = read_run_config(str(payload / RUN_CONFIG)).get("model")
    return model if isinstance(model, dict) else {}


def _token_beyond(config: Any, rows: int) -> str | None:
    """Return the first token of a config that a vocabulary of so many rows lacks, as `key NUMBER`."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token >= rows:
                return f"{key} {token}"
    return None
