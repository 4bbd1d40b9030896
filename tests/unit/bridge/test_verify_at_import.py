# SPDX-License-Identifier: Apache-2.0
"""An import proves itself where nobody has compared a config like its own, and records what it found."""

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from megatron.bridge.release_checkpoint import proof as records
from megatron.bridge.verify import at_import
from megatron.bridge.verify.proved import unproved
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NOT_PROVED, SAME, Verdict


LLAMA = transformers.LlamaConfig()
UNKNOWN = transformers.GPT2Config()


class Twin:
    """Stands for the process that proves a twin."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.result, self.asked, self.ended = answer, None, False

    def send(self, request: dict[str, Any]) -> None:
        self.asked = request

    def answer(self) -> dict[str, Any]:
        return self.result

    def end(self) -> None:
        self.ended = True


def run(monkeypatch: pytest.MonkeyPatch, config: Any, verify: bool | None, answer: Any, strict: bool = True) -> Any:
    """Run an import that does nothing but prove itself. Returns the recorded verdict, and the process."""
    twin = Twin({"verdict": answer.plain()} if isinstance(answer, Verdict) else answer)
    started = []
    monkeypatch.setattr(at_import, "Process", lambda task, module: started.append(task) or twin)
    monkeypatch.setattr(at_import, "why_not", lambda: None)

    @records.of_import
    @at_import.ends_with
    def import_ckpt() -> Any:
        at_import.start(SimpleNamespace(hf_pretrained=SimpleNamespace(config=config)), "m", verify, strict)
        at_import.conclude("payload")
        return records.noted().verdict

    found = import_ckpt()
    assert twin.ended == bool(started)
    return found, started


def test_proved_config_starts_nothing(monkeypatch: pytest.MonkeyPatch):
    assert run(monkeypatch, LLAMA, None, {}) == (None, [])
    assert run(monkeypatch, UNKNOWN, False, {}) == (None, [])


def test_model_that_needs_transformer_engine_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A proof has Megatron Core's own layers, which can't make it."""
    config = transformers.Gemma2Config(architectures=["Gemma2ForCausalLM"])
    found, started = run(monkeypatch, config, None, {})
    assert (found["verdict"], started) == (NOT_PROVED, [])
    assert "not proved: its layers need Transformer Engine" in caplog.text


@pytest.mark.parametrize("verdict", [SAME, FLAGS, NOT_PROVED])
def test_verdict_of_a_twin_is_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, verdict: str
):
    found, started = run(monkeypatch, UNKNOWN, None, Verdict(verdict, "twin", notes=["why"]))
    assert found["verdict"] == verdict and started == ["prove"]
    assert ("why" in caplog.text) == (verdict != SAME)


def test_process_that_ends_proves_nothing(monkeypatch: pytest.MonkeyPatch):
    found, _ = run(monkeypatch, UNKNOWN, None, {"error": "killed", "by": "process"})
    assert found["verdict"] == NOT_PROVED and found["notes"] == ["killed"]


def test_other_model_is_refused_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    other = Verdict(DIFFERS, "twin", notes=["Bridge's model is another, too"])
    with pytest.raises(ValueError, match=r"m: Megatron Core would compute another model .* pass strict=False"):
        run(monkeypatch, UNKNOWN, None, other)
    assert run(monkeypatch, UNKNOWN, None, other, strict=False)[0]["verdict"] == DIFFERS
    assert "another, too" in caplog.text


@pytest.mark.parametrize(("fits", "of"), [(True, "model"), (False, "twin")])
def test_wanted_proof_is_of_the_staged_payload(monkeypatch: pytest.MonkeyPatch, fits: bool, of: str):
    staged = SimpleNamespace(parameters=1, args=None)
    monkeypatch.setattr(at_import, "examine_payload", lambda path: staged)
    monkeypatch.setattr(at_import, "is_quantized", lambda source: False)
    monkeypatch.setattr(at_import, "fits", lambda parameters: fits)
    monkeypatch.setattr(at_import, "prove", lambda payload, source, trust, adapter: Verdict(SAME))
    monkeypatch.setattr(at_import, "prove_twin", lambda source, trust, args: Verdict(SAME, "twin"))
    assert run(monkeypatch, LLAMA, True, {})[0]["of"] == of


def test_what_is_unproved_is_named():
    assert unproved(LLAMA) == []
    assert unproved(UNKNOWN) == ["model_type=gpt2"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert unproved(transformers.LlamaConfig(rope_parameters=rope)) == ["rope_type=dynamic"]
    negative = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": -1.0})
    assert unproved(negative) == ["rope_theta=-1.0"]
