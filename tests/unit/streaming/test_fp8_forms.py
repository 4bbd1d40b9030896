# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints as each tool writes them: the release equals that of the dequantized checkpoint, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8 import expected, random
from test_quantized import method, rewrite
from tiny_models import assert_same_weights, save_hf_model, weights

from megatron.bridge import AutoBridge


def quantize(folder: Path, shape, suffix, dtype=torch.float32, **others):
    """Make every matrix of the layers FP8, and return what it is when it is dequantized."""
    plain = {name: each.bfloat16() for name, each in load_file(folder / "model.safetensors").items()}
    tensors = dict(plain)
    for name, weight in plain.items():
        if "layers" in name and weight.dim() == 2 and "gate.weight" not in name:
            scales, edges = shape(weight)
            stored, scale = random(weight.shape, scales)
            scale = (scale / 10).to(dtype)
            tensors |= {name: stored, name.removesuffix("weight") + suffix: scale}
            tensors |= {name.removesuffix("weight") + other: torch.ones(1) for other in others.get("others", ())}
            plain[name] = expected(stored, scale.float(), edges).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


def blocks(edge):
    return lambda weight: (tuple(-(-size // edge) for size in weight.shape), (edge, edge))


def channels(weight):
    return (weight.shape[0], 1), (1, weight.shape[1])


def whole(weight):
    return (), tuple(weight.shape)


# name: (family, scales, what they are called, quantization_config, further options)
FORMS = {
    "Qwen3": ("qwen3", blocks(128), "weight_scale_inv", method("fp8", weight_block_size=[128, 128]), {}),
    "Qwen3, cut off": ("qwen3", blocks(48), "weight_scale_inv", method("fp8", weight_block_size=[48, 48]), {}),
    "Qwen3-MoE": ("qwen3-moe", blocks(32), "weight_scale_inv", method("fp8", weight_block_size=[32, 32]), {}),
    "Mistral": ("mistral", whole, "weight_scale_inv", method("fp8"), {"others": ["activation_scale"]}),
    "compressed-tensors, channel": (
        "llama-3",
        channels,
        "weight_scale",
        method("compressed-tensors"),
        {"dtype": torch.bfloat16},
    ),
    "compressed-tensors, tensor": (
        "llama-3",
        whole,
        "weight_scale",
        method("compressed-tensors"),
        {"others": ["input_scale"]},
    ),
    "ModelOpt": (
        "llama-3",
        whole,
        "weight_scale",
        method("modelopt", quant_algo="FP8"),
        {"others": ["input_scale", "k_scale"]},
    ),
    "FBGEMM": ("llama-3", channels, "weight_scale", method("fbgemm_fp8"), {"others": ["input_scale_ub"]}),
    "DeepSeek-V3": ("deepseek-v3", blocks(64), "weight_scale_inv", method("fp8", weight_block_size=[64, 64]), {}),
    "config lost": ("llama-3", blocks(32), "weight_scale_inv", {}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_release_is_that_of_the_dequantized_checkpoint(tmp_path, form):
    family, shape, suffix, config, options = FORMS[form]
    hf, plain = save_hf_model(tmp_path / "hf", family), save_hf_model(tmp_path / "plain", family)
    dequantized = quantize(hf, shape, suffix, **options)
    rewrite(hf, dict, dtype="bfloat16", **config)
    rewrite(plain, lambda _: dequantized, dtype="bfloat16")
    for each in (hf, plain):
        AutoBridge.import_ckpt(each, tmp_path / "out" / each.name)
    assert_same_weights(*(weights(tmp_path / "out" / each.name / "release") for each in (hf, plain)))
