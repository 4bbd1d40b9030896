# SPDX-License-Identifier: Apache-2.0
"""Families with mappings of their own kind stream what the import in memory writes: transposed, interleaved, fused."""

import logging

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from random_models import FURTHER, MTP, save_random_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, weights

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.streaming import plan


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="compares bits of what is computed without an accelerator"
)


def read(payload):
    return {key: (tensor.dtype, tensor.tolist()) for key, tensor in weights(payload).items()}


@pytest.mark.parametrize("family", [*FURTHER, MTP])
def test_a_family_streams(tmp_path, monkeypatch, caplog, family):
    caplog.set_level(logging.WARNING, logger=plan.__name__)
    if family in FURTHER:
        monkeypatch.setitem(FAMILIES, family, FURTHER[family])
    hf = save_random_model(tmp_path / "hf", family)
    for streaming in (False, True):
        AutoBridge.import_ckpt(hf, tmp_path / str(streaming), streaming=streaming)
    assert not [line for line in caplog.messages if "not streamed" in line]
    assert read(tmp_path / "True/release") == read(tmp_path / "False/release")


def quantize(hf):
    """Store the linear weights of a checkpoint as DeepSeek does: FP8, and the inverse scale of each block."""
    tensors = load_file(hf / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name and name.endswith(".weight")]:
        weight = tensors[name].float()
        blocks = [-(-size // 128) for size in weight.shape]
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) + 0.5
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_in_fp8_streams(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger=plan.__name__)
    hf = save_random_model(tmp_path / "hf", "deepseek-v3")
    quantize(hf)
    for streaming in (False, True):
        AutoBridge.import_ckpt(hf, tmp_path / str(streaming), streaming=streaming)
    assert not [line for line in caplog.messages if "not streamed" in line]
    assert read(tmp_path / "True/release") == read(tmp_path / "False/release")
