# SPDX-License-Identifier: Apache-2.0
"""The families that convert on a host without Transformer Engine: those of the functional tests, and further ones."""

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file


Kind = tuple[torch.Size, torch.dtype]

_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

FURTHER = (
    models.Family("deepseek-v2", "DeepseekV2Config", _LATENT | _EXPERTS | {"head_dim": 16}),
    models.Family("deepseek-v3-mtp", "DeepseekV3Config", _LATENT | _EXPERTS | {"num_nextn_predict_layers": 1}),
    models.Family("gemma", "GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    models.Family("glm-4.5", "Glm4MoeConfig", _EXPERTS | {"head_dim": 16, "num_nextn_predict_layers": 0}),
    models.Family("glm-4.5-mtp", "Glm4MoeConfig", _EXPERTS | {"head_dim": 16, "num_nextn_predict_layers": 1}),
    models.Family("glm-4-moe-lite", "Glm4MoeLiteConfig", _LATENT | _EXPERTS | {"num_nextn_predict_layers": 0}),
    models.Family(
        "gpt-oss",
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    models.Family(
        "hy-v3",
        "HYV3Config",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            # transformers says it by `mlp_layer_types` alone, Bridge reads what Tencent's own config.json has.
            "first_k_dense_replace": 1,
        },
    ),
    models.Family("nemotron", "NemotronConfig", {"head_dim": 16}),
    models.Family("olmoe", "OlmoeConfig", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
)
FAMILIES = models.FAMILIES | {family.name: family for family in FURTHER}


def make_model(folder: Path, name: str) -> Path:
    """Write a tiny checkpoint of a family in bf16, as most are published; no tensor is what a fresh model holds.

    Args:
        folder: Where it goes.
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
    """Return what DeepSeek's and GLM's layer for multi-token prediction has, which transformers doesn't make.

    It is one more layer like the last, with a projection and three norms of its own.
    """
    size, number = config["hidden_size"], config["num_hidden_layers"]
    own = {"enorm": (size,), "hnorm": (size,), "eh_proj": (size, 2 * size), "shared_head.norm": (size,)}
    last, new = f"model.layers.{number - 1}.", f"model.layers.{number}."
    return {new + each.removeprefix(last): kind for each, kind in kinds.items() if each.startswith(last)} | {
        f"{new}{each}.weight": (torch.Size(shape), torch.bfloat16) for each, shape in own.items()
    }
