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
    """Return what there_and_back.py says of each architecture."""
    command = [sys.executable, str(FAMILIES / "there_and_back.py"), *KINDS.values()]
    done = subprocess.run(command, capture_output=True, text=True, env=steps.environment())
    rows = map(json.loads, done.stdout.splitlines())
    return {row["architecture"]: row for row in rows} or pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_of_each_kind_goes_out_and_back(results: dict[str, dict], kind: str) -> None:
    """Every tensor comes back bit for bit, with its dtype."""
    assert results[KINDS[kind]]["lines"] == []


def test_a_script_converts_it_without_knowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a script has imported Megatron Core without Transformer Engine, and stays as it is."""
    monkeypatch.syspath_prepend(FAMILIES)
    import tiny

    tiny.make_model(tmp_path / "hf", "Gemma2ForCausalLM")
    AutoBridge.import_ckpt(tmp_path / "hf", tmp_path / "megatron")
    AutoBridge.from_hf_pretrained(tmp_path / "hf").export_ckpt(tmp_path / "megatron", tmp_path / "back")
    assert differences(Tensors(tmp_path / "hf"), Tensors(tmp_path / "back")) == []


TWO_RANKS = """
import sys
from megatron.bridge import AutoBridge
hf, megatron, back = sys.argv[1:]
AutoBridge.import_ckpt(hf, megatron)
AutoBridge.from_hf_pretrained(hf).export_ckpt(megatron, back, show_progress=False)
"""


def test_each_rank_of_torchrun_has_a_process_that_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of the ranks form a group of their own, once for the import and once for the export."""
    monkeypatch.syspath_prepend(FAMILIES)
    import tiny

    tiny.make_model(tmp_path / "hf", "Gemma2ForCausalLM")
    script = tmp_path / "convert.py"
    script.write_text(TWO_RANKS)
    command = [*steps.launch(script, ranks=2), *(str(tmp_path / each) for each in ("hf", "megatron", "back"))]
    done = subprocess.run(command, capture_output=True, text=True, env=steps.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(Tensors(tmp_path / "hf"), Tensors(tmp_path / "back")) == []
