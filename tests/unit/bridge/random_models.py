# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in which every tensor is random, and families whose layers differ from those of `tiny_models`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_hf_model
from transformers import AutoConfig


MTP = "deepseek-v3-mtp"

# Zero-centered norms, norms with a bias, attention sinks, experts that Bridge maps by Transformer Engine's names only.
FURTHER = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {"head_dim": 16}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    "glm-4.5": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        },
    ),
}


def save_random_model(folder, family, dtype=torch.bfloat16):
    """A checkpoint in which no tensor is what a fresh model holds: norms and router biases are random, too."""
    save_hf_model(folder, family.removesuffix("-mtp"))
    names_and_shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    if family == MTP:
        names_and_shapes |= _add_multi_token_prediction(folder, names_and_shapes)
    torch.manual_seed(1)
    tensors = {
        # Hugging Face keeps this one in float32, and so does Megatron.
        name: torch.randn(shape, dtype=torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        for name, shape in names_and_shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _change_config(folder, dtype=str(dtype).removeprefix("torch."))
    return folder


def _add_multi_token_prediction(folder, shapes):
    config = AutoConfig.from_pretrained(folder)
    _change_config(folder, num_nextn_predict_layers=1)
    last, new = (f"model.layers.{config.num_hidden_layers - offset}." for offset in (1, 0))
    size = config.hidden_size
    own = {"enorm": (size,), "hnorm": (size,), "eh_proj": (size, 2 * size), "shared_head.norm": (size,)}
    return {new + name.removeprefix(last): shape for name, shape in shapes.items() if name.startswith(last)} | {
        f"{new}{name}.weight": shape for name, shape in own.items()
    }


def _change_config(folder, **values):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
