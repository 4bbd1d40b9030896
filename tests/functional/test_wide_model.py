# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with Llama-3-8B's true width and vocabulary, in shards with an index: what tiny models can't show."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import steps
from reference import Tensors, differences, hf_loss

from megatron.bridge import AutoBridge


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the model. With its conversions it takes 9 GB of disk, which are free again when the tests are done."""
    folder = tmp_path_factory.mktemp("wide")
    yield models.make_wide_model(folder / "hf")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def imported(wide: Path) -> Path:
    AutoBridge.import_ckpt(wide, wide.parent / "megatron")
    return wide.parent / "megatron"


def test_megatron_lm_has_hugging_face_s_loss(wide: Path, imported: Path, chats: steps.Chats) -> None:
    """Evaluate only: with gradients and an optimizer, 1.5 billion weights in float32 need 24 GB."""
    judged = steps.train(
        "evaluation of the wide model",
        wide.parent / "judged",
        chats,
        load=imported,
        iterations=1,
        flags=[
            *steps.model_flags(imported, in_float32=True),
            "--skip-train",
            "--global-batch-size=2",
            "--seq-length=64",
        ],
    )
    expected = hf_loss(wide, judged.batches(0, "valid"))
    assert judged.losses("valid")[0] == pytest.approx(expected, abs=1e-4)


def test_comes_back_bit_for_bit(wide: Path, imported: Path) -> None:
    AutoBridge.from_hf_pretrained(wide).export_ckpt(imported, wide.parent / "back")
    assert differences(Tensors(wide), Tensors(wide.parent / "back")) == []
