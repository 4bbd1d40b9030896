# SPDX-License-Identifier: Apache-2.0
"""A family of each kind that asks for Transformer Engine goes out and back on a host without it.

`nox -s families` takes all of them (tests/families/).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import steps
from reference import Tensors, differences

from megatron.bridge import AutoBridge


FAMILIES = Path(__file__).parents[1] / "families"
KINDS = {
    "dense, with norms of its own": "Gemma2ForCausalLM",
    "mixture of experts": "MiniMaxM2ForCausalLM",
    "latent attention": "GlmMoeDsaForCausalLM",
    "hybrid with Mamba": "NemotronHForCausalLM",
    "linear attention": "Qwen3NextForCausalLM",
    "vision": "Qwen3VLForConditionalGeneration",
    "audio": "Qwen2AudioForConditionalGeneration",
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """Return what check.py says of each architecture."""
    command = [sys.executable, str(FAMILIES / "check.py"), *KINDS.values()]
    done = subprocess.run(command, capture_output=True, text=True, env=steps.environment())
    rows = map(json.loads, done.stdout.splitlines())
    return {row["architecture"]: row for row in rows} or pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_of_each_kind_goes_out_and_back(results: dict[str, dict], kind: str) -> None:
    """Every tensor comes back bit for bit, with its dtype."""
    assert results[KINDS[kind]]["lines"] == 0, results[KINDS[kind]]["first"]


def test_a_script_converts_it_without_knowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a script has imported Megatron Core without Transformer Engine, and stays as it is."""
    monkeypatch.syspath_prepend(FAMILIES)
    import tiny

    tiny.make_model(tmp_path / "hf", "Gemma2ForCausalLM")
    AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "megatron")
    AutoBridge.from_hf_pretrained(tmp_path / "hf").export_ckpt(tmp_path / "megatron", tmp_path / "back")
    assert differences(Tensors(tmp_path / "hf"), Tensors(tmp_path / "back")) == []
