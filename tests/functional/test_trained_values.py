# SPDX-License-Identifier: Apache-2.0
"""An export says what was trained: config.json has the values of the checkpoint's args, and transformers computes with
them what Megatron-LM does."""

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import steps
from reference import Tensors, differences, hf_loss
from variants import rope

from megatron.bridge import AutoBridge


LOSS_TOLERANCE = 1e-4  # float32: two implementations of the same arithmetic


def alone(root: Path) -> Path:
    """Leave what Megatron-LM would save of a release: no run config, and no files of the model."""
    payload = root / "release"
    (payload / "run_config.yaml").unlink()
    shutil.rmtree(payload / "hf")
    payload.rename(root / "iter_0000002")
    (root / steps.TRACKER).write_text("2")
    return root


def test_megatron_lm_trains_with_other_values(workplace: Path, llama: Path, chats: steps.Chats) -> None:
    """Rotary base, scaling and norm epsilon of the command line are in the export, and its loss is Megatron-LM's."""
    root = workplace / "other-values"
    AutoBridge.import_ckpt(llama, root)
    flags = list(steps.model_flags(root, use_checkpoint_args=False))
    for name, value in (("--rotary-base", "20000"), ("--norm-epsilon", "0.001")):
        flags[flags.index(name) + 1] = value
    flags += ["--rotary-seq-len-interpolation-factor=4", "--lr=0"]
    trained = steps.train("other values", workplace / "trained-otherwise", chats, load=root, iterations=1, flags=flags)
    export = workplace / "exported-otherwise"
    AutoBridge.from_hf_pretrained(llama).export_ckpt(trained.checkpoint, export, source_path=llama)
    config = json.loads((export / "config.json").read_text())
    assert config["rms_norm_eps"] == 0.001
    assert config["rope_parameters"] == {"rope_theta": 20000.0, "rope_type": "linear", "factor": 4.0}
    assert trained.losses()[1] == pytest.approx(hf_loss(export, trained.batches(1)), abs=LOSS_TOLERANCE)


# The model onto which it is exported, and what the trained one has otherwise.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "more rows": ("llama-3", {"vocab_size": 512}),
    "fewer layers, another base": ("llama-3", {"num_hidden_layers": 2, **rope("default", 1e4)}),
    "biases": ("llama-3", {"attention_bias": True, "mlp_bias": True}),
    "a head of its own": ("llama-3.2", {"tie_word_embeddings": False}),
    "more experts, a dense layer": ("qwen3-moe", {"num_local_experts": 8, "mlp_only_layers": [1]}),
}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("family", "changes"), CHANGED.values(), ids=CHANGED)
def test_export_onto_another_config(tmp_path: Path, family: str, changes: dict[str, Any], streaming: bool) -> None:
    """What the config can say is written, and the weights come back as they are."""
    source = models.make_model(tmp_path / "hf", family, **changes)
    onto = models.make_model(tmp_path / "onto", family)
    AutoBridge.import_ckpt(source, tmp_path / "megatron")
    export, trained = tmp_path / "export", alone(tmp_path / "megatron")
    AutoBridge.from_hf_pretrained(onto).export_ckpt(trained, export, source_path=onto, streaming=streaming)
    expected, found = Tensors(source), Tensors(export)
    assert set(expected) == set(found)
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    written = json.loads((export / "config.json").read_text())
    assert {key: written[key] for key in changes} == changes


def test_export_by_the_args_alone(workplace: Path, llama: Path, tmp_path: Path) -> None:
    """A checkpoint that names no Hugging Face model is exported as a Llama, without a tokenizer."""
    AutoBridge.import_ckpt(llama, tmp_path / "megatron")
    trained, export = alone(tmp_path / "megatron"), tmp_path / "export"
    AutoBridge.from_megatron_args(trained).export_ckpt(trained, export)
    assert differences(Tensors(llama), Tensors(export)) == []
    written, known = (json.loads((folder / "config.json").read_text()) for folder in (export, llama))
    assert {key: written[key] for key in ("architectures", "rope_parameters", "rms_norm_eps", "head_dim")} == {
        key: known[key] for key in ("architectures", "rope_parameters", "rms_norm_eps", "head_dim")
    }
