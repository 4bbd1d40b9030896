# SPDX-License-Identifier: Apache-2.0
"""What a proof concludes from the answers of its processes."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.bridge.verify import proof
from megatron.bridge.verify.memory import free_memory
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NOT_PROVED, SAME


def computed(difference: float) -> dict[str, Any]:
    return {"figures": {"largest_difference": difference, "largest_logit": 4.0}, "tokens": 512}


GOOD, BAD, NAN = computed(1e-6), computed(2.0), computed(float("nan"))
FAILED = {"error": "ValueError: no", "by": "megatron-lm"}
NO_TRANSFORMERS = {"error": "KeyError: 'new'", "by": "transformers"}
PAYLOAD: Any = SimpleNamespace(
    path=Path("release"),
    args=Namespace(use_rope_scaling=True, rope_scaling_factor=32.0, num_layers=2),
    missing_args=[],
    damage=[],
    dtypes=["bfloat16"],
    format="torch_dist",
    parameters=10,
)


class Processes:
    """Stands for all processes: answers as it is told, and keeps the questions."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, {}


class Answering:
    """Stands for one process."""

    def __init__(self, processes: Processes, task: str) -> None:
        self.processes, self.task = processes, task

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer."""
        self.processes.asked[self.task] = request
        return self.processes.answers[self.task.replace("-", "_")]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the processes answer so."""

    def prepare(**answers: dict[str, Any]) -> Processes:
        processes = Processes(**answers)
        monkeypatch.setattr(proof, "Process", lambda task: Answering(processes, task))
        return processes

    monkeypatch.setattr(proof, "why_not", lambda: None)
    monkeypatch.setattr(proof, "examine", lambda path: SimpleNamespace(payload=PAYLOAD, layout="release"))
    return prepare


@pytest.mark.parametrize(
    ("megatron_lm", "bridge", "verdict", "words"),
    [
        (GOOD, None, SAME, ""),
        (BAD, GOOD, FLAGS, "drops --rope-scaling-factor 32.0"),
        (FAILED, GOOD, FLAGS, "drops --rope-scaling-factor 32.0"),
        (BAD, BAD, DIFFERS, "in gpt_builders.py; Bridge's model is another, too"),
        (NAN, NAN, DIFFERS, "no flags of Megatron-LM build this model"),
        (FAILED, BAD, DIFFERS, "no flags of Megatron-LM build this model"),
        (BAD, FAILED, NOT_PROVED, "Bridge's model can't be computed here: ValueError: no"),
        (FAILED, FAILED, NOT_PROVED, "no flags of Megatron-LM build this model"),
        (NO_TRANSFORMERS, None, NOT_PROVED, "transformers can't compute the model here: KeyError: 'new'"),
    ],
)
def test_verdict_follows_from_both_models(answer: Any, megatron_lm: Any, bridge: Any, verdict: str, words: str):
    asked = answer(megatron_lm=megatron_lm, bridge=bridge).asked
    found = proof.verify("out", "hf", twin=False)
    assert found.verdict == verdict and found.of == "model" and words in found.line
    assert asked["megatron-lm"]["dtype"] == "bfloat16" and asked["megatron-lm"]["flags"][0] == "--use-checkpoint-args"
    assert ("bridge" in asked) == (bridge is not None)


@pytest.mark.parametrize(
    ("megatron_lm", "words"),
    [
        (FAILED, "doesn't start with the printed flags: ValueError: no"),
        (BAD, "started with the printed flags, computes another model; Bridge's model is another, too"),
    ],
)
def test_printed_flags_are_named_only_where_there_are_any(
    answer: Any, monkeypatch: pytest.MonkeyPatch, megatron_lm: Any, words: str
):
    monkeypatch.setattr(PAYLOAD, "args", Namespace(num_layers=2))
    answer(megatron_lm=megatron_lm, bridge=BAD)
    assert words in proof.verify("out", "hf", twin=False).line


def test_model_of_which_no_twin_is_made_is_not_proved(answer: Any):
    answer(twin={"error": "no twin can be made of it", "by": "config"})
    assert proof.verify("out", "hf", twin=True).line == "not proved: no twin can be made of it"


def test_twin_of_another_config_differs(answer: Any, monkeypatch: pytest.MonkeyPatch):
    answer(twin={"args": {"num_layers": 3}}, megatron_lm=GOOD)
    assert "num_layers is 2, expected 3" in proof.verify("out", "hf", twin=True).line
    answer(twin={"args": {"num_layers": 2}}, megatron_lm=GOOD)
    found = proof.verify("out", "hf", twin=True)
    assert (found.verdict, found.of) == (SAME, "twin")
    answer(twin={"error": "ValueError: refused", "by": "import"}, megatron_lm=GOOD)
    assert "can't be made: ValueError: refused" in proof.verify("out", "hf", twin=True).line


def test_quantized_model_and_large_model_are_represented_by_twins(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "config.json"
    config.write_text("{}")
    answer(twin={"args": {}}, megatron_lm=GOOD)
    assert proof.verify("out", tmp_path).of == "model"
    monkeypatch.setattr(proof, "fits", lambda parameters: False)
    assert proof.verify("out", tmp_path).of == "twin"
    monkeypatch.setattr(proof, "fits", lambda parameters: True)
    config.write_text('{"quantization_config": {}}')
    assert proof.verify("out", tmp_path).of == "model"
    config.write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert proof.verify("out", tmp_path).of == "twin"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"payload": None}, "holds no checkpoint"),
        ({"layout": "training"}, "pass its export"),
        ({"damage": ["a shard is missing"]}, "can't be verified: a shard is missing"),
        ({"format": "torch"}, "it has the format torch"),
        ({"missing_args": ["num_layers"]}, "holds no Megatron-LM args"),
    ],
)
def test_what_can_not_be_loaded_is_refused(answer: Any, monkeypatch: pytest.MonkeyPatch, changes: Any, words: str):
    payload = SimpleNamespace(**(vars(PAYLOAD) | changes))
    found = SimpleNamespace(**({"payload": payload, "layout": "release"} | changes))
    monkeypatch.setattr(proof, "examine", lambda path: found)
    with pytest.raises(ValueError, match=words):
        proof.verify("out")


def test_older_core_says_that_it_can_not(answer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(proof.metadata, "version", lambda name: "0.18.2")
    assert "a proof needs megatron-core 0.19" in str(proof.why_not())


def test_free_memory_is_that_of_the_group(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert free_memory(tmp_path, tmp_path) == 50 << 10
    for name, text in {"max": "9000", "current": "5000", "stat": "anon 1\ninactive_file 1000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path, tmp_path) == 5000
