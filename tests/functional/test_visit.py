# SPDX-License-Identifier: Apache-2.0
"""A visit on the CPU runs its first two rows, from the carried release checkpoints to the report."""

import json
import sys
from pathlib import Path

import gate
import steps


def test_first_two_rows(tmp_path: Path) -> None:
    gate.write(tmp_path / "carried", ["llama-3"])
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(steps.HERE / "visit.py"), "--platform=cpu", "--minutes=9"),
        *(f"--carried={tmp_path / 'carried'}", f"--out={out}", "--row=llama-3-1-rank-local", "--row=gate-llama-3"),
    ]
    steps.Step("visit", command, tmp_path / "log.txt").run()
    first, *results = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert first["visit"]["machine"]["platform"] == "cpu"
    trained, at_the_gate = (line["result"] for line in results)
    assert (trained["name"], trained["outcome"]) == ("llama-3-1-rank-local", "passed")
    assert {"fine-tune", "resumed", "uninterrupted", "Hugging Face"} == set(trained["curves"])
    # It computes, with local layers; that is never a pass.
    assert (at_the_gate["name"], at_the_gate["outcome"]) == ("gate-llama-3", "left out")
    assert at_the_gate["reason"] == "rehearsed with Megatron Core's local layers; the gate needs Transformer Engine"
    assert at_the_gate["figures"]["logit difference, float32"] < 1e-5
    assert "1 passed, 0 failed, 1 left out" in (out / "report.txt").read_text()
    assert "llama-3-1-rank-local" in (out / "report.html").read_text()
