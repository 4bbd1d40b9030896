# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM trains on the CPU what needs Transformer Engine or mamba-ssm, with stand-ins that compute.

tests/families/computing.py has the stand-ins. Megatron-LM's parser, model, optimizer, checkpoint code, and loop are
its own.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import steps
from reference import Tensors, differences, hf_loss

from megatron.bridge import AutoBridge


sys.path.append(str(Path(__file__).parents[1] / "families"))
KINDS = {"hybrid with Mamba": "NemotronHForCausalLM", "latent attention": "DeepseekV3ForCausalLM"}
# The stand-ins have no fused kernels.
FLAGS = (
    "--transformer-impl=transformer_engine",
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
    "--disable-mamba-mem-eff-path",
    "--attention-backend=unfused",
)


@pytest.mark.parametrize("kind", KINDS)
def test_megatron_lm_trains_from_a_release(tmp_path: Path, chats: steps.Chats, kind: str) -> None:
    """It starts with transformers' loss, learns, and saves every tensor that an export needs."""
    import tiny

    source = tiny.make_model(tmp_path / "hf", KINDS[kind])
    megatron = tmp_path / "megatron"
    AutoBridge.import_ckpt(source, megatron)
    done = steps.train(
        f"three iterations of a model of the kind {kind}",
        tmp_path / "training",
        replace(chats, tokenizer=source),
        load=megatron,
        save=megatron,
        iterations=3,
        megatron_lm=["--stand-ins"],
        flags=[*steps.model_flags(megatron, in_float32=True), *FLAGS],
    )
    losses = done.losses()
    assert losses[1] == pytest.approx(hf_loss(source, done.batches(1)), abs=1e-4)
    assert losses[3] < losses[1]
    AutoBridge.from_hf_pretrained(source).export_ckpt(megatron, tmp_path / "back")
    changed = differences(Tensors(source), Tensors(tmp_path / "back"))
    assert changed and not [line for line in changed if line.startswith("only in")], changed
