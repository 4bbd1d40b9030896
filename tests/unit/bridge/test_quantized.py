# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: each is refused by name, with what to do, in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.quantized import check_quantization, check_stored_form


LAYER = "model.layers.0.self_attn.q_proj"
WEIGHT = torch.zeros(64, 64)
U8, I32, I8 = (WEIGHT[:8].to(dtype) for dtype in (torch.uint8, torch.int32, torch.int8))
F8, E8 = (WEIGHT[:8].to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu))


def method(name, **values):
    return {"quantization_config": {"quant_method": name} | values}


# name: (what a layer has in place of its weight, what config.json gains, how it is called)
FORMS = {
    "GPTQ": ({"qweight": I32, "qzeros": I32, "scales": WEIGHT, "g_idx": I32}, method("gptq"), "(GPTQ;"),
    "GPTQ, no config": ({"qweight": I32, "qzeros": I32, "scales": WEIGHT, "g_idx": I32}, {}, "(GPTQ;"),
    "AWQ": ({"qweight": I32, "qzeros": I32, "scales": WEIGHT}, method("awq"), "(AWQ or GPTQ;"),
    "INT4": (
        {"weight_packed": I32, "weight_scale": WEIGHT, "weight_shape": I32},
        method("compressed-tensors", format="pack-quantized"),
        "packed INT4 (compressed-tensors)",
    ),
    "NVFP4": ({"weight_packed": U8, "weight_scale": F8, "weight_global_scale": WEIGHT}, {}, "(NVFP4;"),
    "NVFP4 of ModelOpt": ({"weight": U8, "weight_scale": F8, "weight_scale_2": WEIGHT}, method("modelopt"), "NVFP4"),
    "bitsandbytes 4-bit": (
        {"weight": U8, "weight.absmax": U8, "weight.quant_state.bitsandbytes__nf4": U8},
        method("bitsandbytes"),
        "(bitsandbytes 4-bit;",
    ),
    "bitsandbytes 8-bit": ({"weight": I8, "SCB": WEIGHT}, method("bitsandbytes"), "(bitsandbytes 8-bit;"),
    "HQQ": ({"W_q": U8, "scale": WEIGHT, "zero": WEIGHT}, method("hqq"), "(HQQ;"),
    "MXFP4": ({"weight_blocks": U8, "weight_scales": U8}, method("mxfp4"), "(MXFP4;"),
    "MXFP8": ({"weight": F8, "weight_scale": U8}, method("modelopt", quant_algo="MXFP8"), "(MXFP8, by modelopt;"),
    "MXFP8, no config": ({"weight": F8, "weight_scale": E8[:, :2]}, {}, "(MXFP8;"),
    "FP8, no scales": ({"weight": F8}, method("fp8"), "lacks its scale 'model.layers.0.self_attn.q_proj.weight_scale"),
    "FP8 of an unknown method": ({"weight": F8, "weight_scale": WEIGHT}, method("torchao"), "'torchao', which is not"),
    "INT8 beside FP8": ({"weight": I8, "o.weight": F8, "o.weight_scale": WEIGHT}, method("modelopt"), "(integer, by"),
    "INT8": ({"weight": I8, "weight_scale": WEIGHT}, method("compressed-tensors"), "(integer, by compressed-tensors;"),
    "unknown": ({"weight": WEIGHT}, method("bitnet"), "the quantization 'bitnet', which is not known"),
    "unknown, no name": ({"weight": WEIGHT}, {"quantization_config": {}}, "the quantization 'unknown'"),
}


@pytest.fixture
def hf(tmp_path):
    return save_hf_model(tmp_path / "hf")


def rewrite(hf, change, **config):
    """Change the tensors of a checkpoint in place, and values of its config."""
    tensors = load_file(hf / "model.safetensors")
    save_file(change(tensors) or tensors, hf / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(content | config))


def refusal(hf):
    with pytest.raises(ValueError) as caught:
        check_stored_form(hf)
    assert "\n" not in str(caught.value) and str(hf) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_refused_by_name(hf, form):
    stored, config, called = FORMS[form]

    def quantize(tensors):
        del tensors[f"{LAYER}.weight"]
        tensors |= {f"{LAYER}.{name}": tensor.clone() for name, tensor in stored.items()}

    rewrite(hf, quantize, **config)
    (hf / "README.md").write_text("---\nlicense: mit\nbase_model:\n- some/model-1.5B\n---\n")
    message = refusal(hf)
    assert called in message and message.endswith(": import the original, unquantized checkpoint, some/model-1.5B")


def test_an_import_leaves_nothing(hf, tmp_path):
    rewrite(hf, lambda tensors: tensors.update({f"{LAYER}.weight": F8}))
    with pytest.raises(
        ValueError, match="lacks its scale '.*weight_scale_inv': import the original, unquantized checkpo"
    ):
        AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_weights_whose_config_still_names_a_quantization(hf):
    """Scripts that dequantize leave it there, and methods of storage say nothing of the model."""
    rewrite(hf, dict, **method("fp8"))
    check_stored_form(hf)


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", None])
@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale"])
def test_fp8_with_scales_is_dequantized_later(hf, name, scale):
    names = {f"{LAYER}.weight": F8, f"{LAYER}.{scale}": WEIGHT[:, :1].clone(), f"{LAYER}.input_scale": WEIGHT[0]}
    rewrite(hf, lambda tensors: tensors.update(names), **method(name) if name else {})
    check_stored_form(hf)


@pytest.mark.parametrize(
    ("architecture", "stored"),
    [
        ("LlamaForCausalLM", {"weight": F8, "weight_scale_inv": WEIGHT}),
        ("GptOssForCausalLM", {"weight_blocks": U8, "weight_scales": U8}),
    ],
)
def test_what_a_bridge_dequantizes_needs_every_scale(architecture, stored):
    config = {"architectures": [architecture]}
    tensors = {f"{layer}.{name}": tensor for layer in ("a", "b") for name, tensor in stored.items()}
    check_quantization("MODEL", config, tensors)
    *_, scale = stored
    del tensors[f"b.{scale}"]
    with pytest.raises(ValueError, match=f"^MODEL: the quantized 'b.weight\\w*' lacks its scale 'b.{scale}': import"):
        check_quantization("MODEL", config, tensors)
