# SPDX-License-Identifier: Apache-2.0
"""The families that convert on a host without Transformer Engine."""

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file


Kind = tuple[torch.Size, torch.dtype]

FAMILIES = models.CONVERTED


def make_model(folder: Path, name: str) -> Path:
    """Write a tiny checkpoint of a family in bf16, like most published ones. No tensor equals that of a new model.

    Args:
        folder: The folder of the checkpoint.
        name: A key of `FAMILIES`.

    Returns:
        `folder`.
    """
    family = FAMILIES[name]
    models.make_model(folder, family, torch.bfloat16)
    path = folder / "model.safetensors"
    kinds = {each: (tensor.shape, tensor.dtype) for each, tensor in load_file(path).items()}
    if family.values.get("num_nextn_predict_layers"):
        kinds |= _multi_token_prediction(kinds, json.loads((folder / "config.json").read_text("utf-8")))
    save_file({each: torch.randn(shape).to(dtype) for each, (shape, dtype) in kinds.items()}, path, {"format": "pt"})
    return folder


def _multi_token_prediction(kinds: dict[str, Kind], config: dict[str, Any]) -> dict[str, Kind]:
    """Return the tensors of DeepSeek's and GLM's layer for multi-token prediction, which transformers doesn't make.

    The layer is like the last one, with an extra projection and three extra norms.
    """
    size, number = config["hidden_size"], config["num_hidden_layers"]
    own = {"enorm": (size,), "hnorm": (size,), "eh_proj": (size, 2 * size), "shared_head.norm": (size,)}
    last, new = f"model.layers.{number - 1}.", f"model.layers.{number}."
    return {new + each.removeprefix(last): kind for each, kind in kinds.items() if each.startswith(last)} | {
        f"{new}{each}.weight": (torch.Size(shape), torch.bfloat16) for each, shape in own.items()
    }
