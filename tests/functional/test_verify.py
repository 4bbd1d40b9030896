# SPDX-License-Identifier: Apache-2.0
"""`megatron-bridge verify` and the proof at import, with real models: each verdict is one that a person would see.

`nox -s variants` runs these: a proof starts two or three processes, each of which imports PyTorch and Megatron Core.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import steps

from megatron.bridge import AutoBridge
from megatron.bridge.models.llama.llama_bridge import LlamaBridge
from megatron.bridge.release_checkpoint import proof
from megatron.bridge.verify.process import IN_PROOF
from megatron.bridge.verify.verdict import FLAGS, SAME


@pytest.fixture(autouse=True)
def with_proofs(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let imports prove themselves, in the session that is for it."""
    if not pytestconfig.option.variants:
        pytest.skip("takes a minute: nox -s variants")
    monkeypatch.delenv(IN_PROOF, raising=False)


def command(*words: str | Path) -> tuple[int, str]:
    """Run megatron-bridge; return its exit code and what it prints."""
    line = [Path(sys.executable).with_name("megatron-bridge"), *words]
    done = subprocess.run(line, capture_output=True, text=True, env=steps.environment())
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def verified(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the document of `verify --json`."""
    code, text = command("verify", *words, "--json")
    return code, json.loads(text[text.index("{") : text.rindex("}") + 1])


def test_release_training_and_export(workplace: Path, llama: Path, chats: steps.Chats) -> None:
    """A release is the model that it came from, a training is its export, and no longer the model."""
    root = workplace / "verified"
    AutoBridge.import_ckpt(llama, root)
    code, verdict = verified(root)
    assert (code, verdict["verdict"], verdict["of"]) == (0, "same", "model")
    assert verdict["figures"]["loss_megatron"] == pytest.approx(verdict["figures"]["loss_transformers"], abs=1e-5)
    assert "same" in command("inspect", root)[1]

    flags = [*steps.model_flags(root), "--lr=1e-2"]
    trained = steps.train("verify", workplace / "verify", chats, load=root, iterations=1, flags=flags).checkpoint
    code, text = command("verify", trained)
    assert code == 1 and "pass its export as the Hugging Face model" in text
    export = workplace / "verified-export"
    AutoBridge.from_hf_pretrained(llama).export_ckpt(trained, export, source_path=llama)
    code, verdict = verified(trained / "iter_0000001", "--hf-model", export)
    assert (code, verdict["verdict"]) == (0, "same")
    code, verdict = verified(trained, "--hf-model", llama)
    assert (code, verdict["verdict"]) == (1, "differs")
    assert verdict["figures"]["largest_difference"] > 1e-4 * verdict["figures"]["largest_logit"]


def test_wrong_conversion_is_refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bridge that takes the gate for the up projection accounts for every tensor, and makes another model."""
    registry = LlamaBridge.mapping_registry

    def wrong(self: LlamaBridge) -> Any:
        found = registry(self)
        for mapping in found.mappings:
            if isinstance(mapping.hf_param, dict) and {*mapping.hf_param} == {"gate", "up"}:
                mapping.hf_param = {"gate": mapping.hf_param["up"], "up": mapping.hf_param["gate"]}
        return found

    monkeypatch.setattr(LlamaBridge, "mapping_registry", wrong)
    with pytest.raises(ValueError, match="Megatron Core would compute another model than transformers"):
        AutoBridge.import_ckpt(llama, tmp_path / "out", verify=True)
    assert not (tmp_path / "out" / steps.TRACKER).exists()
    AutoBridge.import_ckpt(llama, tmp_path / "out", verify=True, strict=False)
    assert "differs" in caplog.text
    assert proof.recorded(tmp_path / "out" / "release").verdict["verdict"] == "differs"
    assert "differs" in command("inspect", tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("family", "changes", "verdict"),
    [
        # The twin of a config that no comparison has covered.
        ("llama-3", {"rms_norm_eps": 0.0}, SAME),
        # Megatron Core has OLMoE's norms in Bridge's layers alone.
        ("olmoe", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}, FLAGS),
    ],
)
def test_twin_at_import(tmp_path: Path, family: str, changes: dict[str, Any], verdict: str) -> None:
    """An import of a config that is new proves its twin, and `inspect` repeats the verdict."""
    AutoBridge.import_ckpt(models.make_model(tmp_path / "hf", family, **changes), tmp_path / "out")
    found = proof.recorded(tmp_path / "out" / "release").verdict
    assert found is not None and found["of"] == "twin"
    assert found["verdict"] == verdict, found


def test_model_that_needs_a_gpu_is_not_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is published with a warning, and the release says so."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "families")
    import tiny

    tiny.make_model(tmp_path / "hf", "Gemma2ForCausalLM")
    AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "out")
    assert "not proved" in caplog.text
    assert proof.recorded(tmp_path / "out" / "release").verdict["verdict"] == "not proved"
    code, verdict = verified(tmp_path / "out")
    assert (code, verdict["verdict"]) == (3, "not proved") and verdict["notes"]
