# SPDX-License-Identifier: Apache-2.0
"""The process of a proof: what it answers, and what is said if it ends without an answer."""

import sys

import pytest
import torch

from megatron.bridge.verify import __main__ as process_code
from megatron.bridge.verify.process import Process
from megatron.bridge.verify.verdict import is_same


def test_figures_of_equal_and_other_logits():
    exact = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    equal = process_code.figures(exact, exact, tokens)
    assert is_same(equal) and equal["kl_divergence"] == 0 and equal["loss_megatron"] == equal["loss_transformers"]
    other = exact.clone()
    other[0, 3, 5] += 1e-3 * exact.abs().max()
    found = process_code.figures(other, exact, tokens)
    assert not is_same(found) and found["kl_divergence"] > 0
    other[0, 3, 5] = torch.nan
    assert not is_same(process_code.figures(other, exact, tokens)) and not is_same(None)


def test_errors_are_one_line():
    assert process_code.in_one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert process_code.in_one_line(SystemExit()) == "SystemExit: no message"
    nested = RuntimeError("ranks [0]\nTraceback (most recent call last): (RANK 0)\n  x\nKeyError: lacks a weight\n")
    assert process_code.in_one_line(nested) == "KeyError: lacks a weight"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("import sys; sys.exit('no module')", "ended with code 1: no module"),
    ],
)
def test_end_without_an_answer_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path, code: str, words: str):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Process("bridge") as process:
        answer = process.ask({})
    assert words in answer["error"] and answer["by"] == "process"


def test_process_is_a_rank_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path):
    script = tmp_path / "python"
    shown = "import json, os; print(json.dumps({k: os.environ.get(k) for k in ('RANK', 'CUDA_VISIBLE_DEVICES')}))"
    script.write_text(f"#!{sys.executable}\n{shown}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("RANK", "1")
    with Process("bridge") as process:
        assert process.ask({"a": 1}) == {"RANK": None, "CUDA_VISIBLE_DEVICES": ""}
