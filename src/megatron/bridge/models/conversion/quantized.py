# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: the forms that a bridge dequantizes are let through, every other one is refused by name.

What is in the files decides, because a config gets lost, or stays behind when weights are dequantized.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.models.conversion import wrapped
from megatron.bridge.models.conversion.hf_files import check_weights, read_json


# Each names its tensors so that one pattern tells it from the others. The first that matches counts.
_FORMS = {
    "GPTQ": re.compile(r"\.g_idx$"),
    "AWQ or GPTQ": re.compile(r"\.(qweight|qzeros)$"),
    "bitsandbytes 4-bit": re.compile(r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+)$"),
    "bitsandbytes 8-bit": re.compile(r"\.(SCB|weight_format)$"),
    "HQQ": re.compile(r"\.W_q$"),
    "NVFP4": re.compile(r"\.(weight_global_scale|weight_scale_2)$"),
    "packed INT4 (compressed-tensors)": re.compile(r"\.weight_(packed|shape|zero_point|g_idx)$"),
    "MXFP4": re.compile(r"\.\w+_blocks$"),
}
_MXFP4, _INT4, _FP8, _INTEGER = "MXFP4", "packed INT4 (compressed-tensors)", "FP8", "integer"
FLOAT8 = tuple(dtype for name, dtype in vars(torch).items() if name.startswith("float8_"))
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)
# How the scale of a quantized weight is called: after the weight, or after its layer.
_SCALES = ("{}_scale_inv", "{}_scale", "{}.scale", "{}_weight_scale", "{}.weight_scale")

# What bridges dequantize while they load (`maybe_modify_loaded_hf_weight`).
_DEQUANTIZED = {
    "DeepseekV3ForCausalLM": {_FP8},
    "DeepseekV4ForCausalLM": {_FP8, _INTEGER},
    "GptOssForCausalLM": {_MXFP4},
    "KimiK25ForConditionalGeneration": {_INT4},
    "MiMoV2FlashForCausalLM": {_FP8},
    "MiniMaxM2ForCausalLM": {_FP8},
    "Mistral3ForConditionalGeneration": {_FP8},
}
# Methods that change how weights are stored, and nothing else: where the weights are plain they say nothing.
_STORAGE = {
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "finegrained_fp8", "fp8", "gptq", "hqq",
    "modelopt", "mxfp4", "nvfp4",
}  # fmt: skip


def check_stored_form(model: str | os.PathLike) -> None:
    """Refuse a folder whose weights are quantized, or those of a wrapped model. Reads headers, no weights.

    Nothing is said of a folder that is damaged, for `check_hf_checkpoint` says it better, nor of a model ID.

    Args:
        model: Path of a checkpoint folder, or a model ID.

    Raises:
        ValueError: The weights are not those of a plain model.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        return
    wrapped.check_adapter(path)
    try:
        config, tensors = read_json(path / "config.json", ""), check_weights(path)
    except (OSError, ValueError):
        return
    wrapped.check_names(path, tensors)
    check_quantization(path, config, tensors)


def check_quantization(model: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a quantized checkpoint, unless its bridge dequantizes it. Reads names and dtypes, no weights.

    Args:
        model: Path or ID of the checkpoint, for the message. The model card of a folder names the original.
        config: Content of config.json.
        tensors: Every tensor by name, on any device.

    Raises:
        ValueError: The weights are quantized and no bridge dequantizes them, or scales are missing.
    """
    method = _method(config)
    form, name = _form(tensors)
    if form is None:
        if method and method not in _STORAGE:
            raise ValueError(f"{model} asks for the quantization {method!r}, which is not known: {_remedy(model)}")
        return
    if form == _FP8 and not any(key.endswith(("_scale_inv", "_scale", ".scale")) for key in tensors):
        raise ValueError(f"{model} has FP8 weights ({name!r}) without their scales: {_remedy(model)}")
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if form not in _DEQUANTIZED.get(architecture, ()):
        said = f", by {method}" if method and method not in form.lower() else ""
        raise ValueError(f"{model} is quantized ({form}{said}; {name!r}), expected plain weights: {_remedy(model)}")
    for name in sorted(tensors):
        if lacking := _lacking(name, tensors):
            raise ValueError(f"{model}: the quantized {name!r} lacks its scale {lacking!r}: {_remedy(model)}")


def _method(config: Mapping[str, Any]) -> str | None:
    nested = config.get("text_config")
    for each in (config, nested if isinstance(nested, dict) else {}):
        quantization = each.get("quantization_config")
        if isinstance(quantization, dict):
            return str(quantization.get("quant_method") or "unknown")
    return None


def _form(tensors: Mapping[str, torch.Tensor]) -> tuple[str | None, str]:
    """Return the form of quantization and a tensor that shows it."""
    for form, pattern in _FORMS.items():
        found = [name for name in tensors if pattern.search(name)]
        if found and (form != _MXFP4 or tensors[min(found)].dtype == torch.uint8):
            return form, min(found)
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype in FLOAT8 and not name.endswith(("scale", "scale_inv")):
            return _FP8, name
    for name, tensor in sorted(tensors.items()):
        if name.endswith(".weight") and tensor.dim() > 1 and tensor.dtype in _PACKED:
            return _INTEGER, name
    return None, ""


def _lacking(name: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the scale that belongs to a quantized tensor and is not there."""
    if name.endswith("_blocks") and tensors[name].dtype == torch.uint8:
        scale = f"{name.removesuffix('_blocks')}_scales"
        return None if scale in tensors else scale
    if tensors[name].dtype not in FLOAT8 or name.endswith(("scale", "scale_inv")):
        return None
    layer = name.removesuffix(".weight")
    if any(scale.format(each) in tensors for scale in _SCALES for each in (name, layer)):
        return None
    return f"{name}_scale_inv"


def _remedy(model: Any) -> str:
    """Say which checkpoint to take. The card of a quantized model names the one that it was made from."""
    card = Path(model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:4096] if card.is_file() else ""
    base = re.search(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", text, re.MULTILINE)
    return f"import the original, unquantized checkpoint{f', {base[1]}' if base else ''}"
