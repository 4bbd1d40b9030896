# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM takes each family of models and gives it back.

What goes out and back without Megatron-LM is in tests/unit/host/test_conversion_without_cuda.py.
"""

from pathlib import Path

import models
import pytest
import steps
from reference import Tensors, differences, hf_loss

from megatron.bridge import AutoBridge


# Megatron Core 0.19's local attention has no argument for the head sizes of latent attention, which MLASelfAttention
# passes.
NEEDS_TRANSFORMER_ENGINE = pytest.mark.xfail(raises=steps.StepFailed, strict=True, reason="needs Transformer Engine")


@pytest.mark.parametrize(
    "family",
    [
        *(name for name in models.FAMILIES if name not in ("llama-3", "deepseek-v3")),
        pytest.param("deepseek-v3", marks=NEEDS_TRANSFORMER_ENGINE),
    ],
)
def test_megatron_lm_takes_and_gives_back(tmp_path: Path, chats: steps.Chats, family: str) -> None:
    """Megatron-LM builds the model from the checkpoint, has Hugging Face's loss, and saves what comes back unchanged.

    `test_release_checkpoint.py` has Llama 3, and training.
    """
    source = models.make_model(tmp_path / "hf", family)
    megatron = tmp_path / "megatron"
    AutoBridge.import_ckpt(source, megatron)
    idle = steps.train(
        f"one idle iteration of {family}",
        tmp_path / "idle",
        chats,
        load=megatron,
        save=megatron,
        iterations=1,
        flags=[*steps.model_flags(megatron), "--lr=0"],
    )
    assert idle.losses()[1] == pytest.approx(hf_loss(source, idle.batches(1)), abs=1e-4)
    AutoBridge.from_hf_pretrained(source).export_ckpt(megatron, tmp_path / "back")
    assert differences(Tensors(source), Tensors(tmp_path / "back")) == []
