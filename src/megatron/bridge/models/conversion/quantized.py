# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: FP8 with scales and what a bridge dequantizes are let through, the rest is refused by name.

What is in the files decides, because a config gets lost, or stays behind when weights are dequantized.
"""

import os
import re
from collections.abc import Container, Mapping
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
_MXFP4, _INT4, _MXFP8, _FP8, _INTEGER = "MXFP4", "packed INT4 (compressed-tensors)", "MXFP8", "FP8", "integer"
FLOAT8 = tuple(dtype for name, dtype in vars(torch).items() if name.startswith("float8_"))
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)
# How the scale of a quantized weight is called: after the weight, or after its layer.
_SCALES = ("{}_scale_inv", "{}_scale", "{}.scale", "{}_weight_scale", "{}.weight_scale")

# What bridges dequantize while they load (`maybe_modify_loaded_hf_weight`), beside FP8.
_DEQUANTIZED = {
    "DeepseekV4ForCausalLM": {_INTEGER},
    "GptOssForCausalLM": {_MXFP4},
    "KimiK25ForConditionalGeneration": {_INT4},
}
# Methods that change how weights are stored, and nothing else: where the weights are plain they say nothing.
_STORAGE = {
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "finegrained_fp8", "fp8", "gptq", "hqq",
    "modelopt", "mxfp4", "nvfp4",
}  # fmt: skip


class UnfitScaleError(ValueError):
    """The shape of a scale doesn't fit that of its weight."""


def check_stored_form(model: str | os.PathLike) -> None:
    """Refuse a folder whose weights are quantized, or those of a wrapped model. Reads headers, no weights.

    A damaged folder passes, because `check_hf_checkpoint` has a better error for it. A model ID passes, too.

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
    if form is None and not method:
        return
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if form not in (None, _FP8) and form not in _DEQUANTIZED.get(architecture, ()):
        said = f", by {method}" if method and method not in form.lower() else ""
        raise ValueError(f"{model} is quantized ({form}{said}; {name!r}), expected plain weights: {_remedy(model)}")
    if method and method not in _STORAGE:
        raise ValueError(f"{model} asks for the quantization {method!r}, which is not known: {_remedy(model)}")
    for name in sorted(tensors):
        if lacking := _lacking(name, tensors):
            raise ValueError(f"{model}: the quantized {name!r} lacks its scale {lacking!r}: {_remedy(model)}")


def is_scale(name: str) -> bool:
    """Return whether a tensor of this name is a scale, which may be of FP8 itself."""
    return name.endswith(("scale", "scale_inv"))


def scale_of(name: str, tensors: Container[str]) -> str | None:
    """Return the name of the scale of an FP8 tensor, None if there is none.

    Args:
        name: The tensor.
        tensors: The names of all tensors.
    """
    layer = name.removesuffix(".weight")
    names = (scale.format(each) for scale in _SCALES for each in (name, layer))
    return next((each for each in names if each in tensors), None)


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
        if name.endswith(".weight") and tensor.dim() > 1 and tensor.dtype in _PACKED:
            return _INTEGER, name
    fp8 = [name for name in sorted(tensors) if _is_fp8(name, tensors)]
    if micro := [name for name in fp8 if _is_micro(name, tensors)]:
        return _MXFP8, micro[0]
    return (_FP8, fp8[0]) if fp8 else (None, "")


def _is_fp8(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    return tensors[name].dtype in FLOAT8 and not is_scale(name)


def _is_micro(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the scales of an FP8 tensor are powers of two of 32 values each (OCP Microscaling)."""
    if (scale := scale_of(name, tensors)) is None:
        return False
    of_32 = tensors[scale].dim() > 1 and 32 * tensors[scale].shape[-1] == tensors[name].shape[-1]
    return tensors[scale].dtype == torch.uint8 or tensors[scale].dtype in FLOAT8 and of_32


def _lacking(name: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the scale that belongs to a quantized tensor and is not there."""
    if name.endswith("_blocks") and tensors[name].dtype == torch.uint8:
        scale = f"{name.removesuffix('_blocks')}_scales"
        return None if scale in tensors else scale
    if _is_fp8(name, tensors) and scale_of(name, tensors) is None:
        return f"{name}_scale_inv"
    return None


def _remedy(model: Any) -> str:
    """Say which checkpoint to take. The card of a quantized model names the one that it was made from."""
    card = Path(model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:4096] if card.is_file() else ""
    base = re.search(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", text, re.MULTILINE)
    return f"import the original, unquantized checkpoint{f', {base[1]}' if base else ''}"
