# SPDX-License-Identifier: Apache-2.0
"""Bridge loads releases of families that ask for Transformer Engine, and computes the logits of transformers.

The stand-ins for Transformer Engine's modules compute here, on the CPU (tests/families/computing.py). Megatron-LM's
`pretrain_gpt.py` has no such models.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import steps


LOGITS = Path(__file__).parents[1] / "families" / "logits.py"
NEAR = 1e-4  # of the largest logit
# What Megatron Core's own layers make is compared by Megatron-LM itself (variants.py).
FAMILIES = (
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM with the exact GELU",
    "MiniMaxM2ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration with a text model of Mistral",
    "OlmoeForCausalLM with fewer key and value heads",
)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """Return how far the logits of each family are apart."""
    done = subprocess.run(
        [sys.executable, str(LOGITS), *FAMILIES], capture_output=True, text=True, env=steps.environment()
    )
    found = {row["architecture"]: row for row in map(json.loads, done.stdout.splitlines())}
    return found or pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_has_the_logits_of_transformers(rows: dict[str, dict], family: str) -> None:
    """Both compute in float32, on the same tokens."""
    assert "error" not in rows[family], rows[family]["error"]
    assert rows[family]["apart"] < NEAR
