# SPDX-License-Identifier: Apache-2.0
"""Reasons to doubt a release checkpoint from an earlier import, which didn't account for what it read.

Such a release has no proof in its `run_config.yaml` (proof.py). Only small files are read, and no weights.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint import proof
from megatron.bridge.release_checkpoint.layout import HF_FILES, RUN_CONFIG


_SMALL = 64 << 20
_HEAD = "lm_head.weight"
# Quantizations that their bridges have always undone: architecture and method.
_RIGHT = {("DeepseekV3ForCausalLM", "fp8"), ("GptOssForCausalLM", "mxfp4")}
# Keys of config.json that imports dropped, by model type, with the values at which that changed nothing.
_DROPPED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": (False, None), "mlp_bias": (False, None)},
    "qwen2": {"use_sliding_window": (False, None)},
    "qwen3": {"attention_bias": (False, None), "use_sliding_window": (False, None)},
    "qwen3_moe": {
        "attention_bias": (False, None),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
        "use_sliding_window": (False, None),
    },
}
_CARRIED_ROPE = ("default", "linear", "llama3", "yarn", None)
_SOURCE = re.compile(r"^\s+hf_model_id: ['\"]?([^'\"\n]+)['\"]?$", re.MULTILINE)


def doubts(payload: Path) -> list[str]:
    """Return why a release may hold another model than its source, a line each. Empty if the import accounted for it.

    Args:
        payload: The folder of a release.
    """
    if not (payload / RUN_CONFIG).is_file() or proof.is_recorded(payload):
        return []
    return [f"{what}, and this import did not account for it: import the model again" for what in _doubts(payload)]


def _doubts(payload: Path) -> Iterator[str]:
    source = _source(payload)
    config = _json(payload / HF_FILES / "config.json") or (_json(source / "config.json") if source else {})
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method"))
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or not any((str(each), method) in _RIGHT for each in architectures):
            yield f"the source is quantized ({method})"
    for key, plain in _DROPPED.get(str(config.get("model_type")), {}).items():
        if config.get(key) not in plain:
            yield f"config.json has {key} {json.dumps(config[key])[:100]}, which earlier imports dropped"
    for rope in (config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(rope, dict) and (kind := rope.get("rope_type") or rope.get("type")) not in _CARRIED_ROPE:
            yield f"config.json scales RoPE by {json.dumps(kind)[:100]}, which earlier imports dropped"
    if config.get("tie_word_embeddings") is True and source and _has_head(source):
        yield f"the source has tied embeddings and a {_HEAD!r} of its own"


def imported_from(payload: Path) -> str | None:
    """Return the Hugging Face model that a payload's run config names: a folder, or a name on the hub."""
    try:
        found = _SOURCE.search((payload / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found[1] if found and found[1] != "null" else None


def _source(payload: Path) -> Path | None:
    """Return the folder that a release was imported from, if it is still there."""
    found = imported_from(payload)
    return Path(found) if found and Path(found).is_dir() else None


def _has_head(source: Path) -> bool:
    index = _json(source / "model.safetensors.index.json").get("weight_map")
    return _HEAD in index if isinstance(index, dict) else _HEAD in _header(source / "model.safetensors")


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)) if size < _SMALL else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < _SMALL else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
