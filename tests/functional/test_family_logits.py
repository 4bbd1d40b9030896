# SPDX-License-Identifier: Apache-2.0
"""Bridge loads releases of families that ask for Transformer Engine, and computes the logits of transformers.

The stand-ins for Transformer Engine's, mamba-ssm's and FLA's modules compute here, on the CPU
(tests/families/computing.py). Megatron-LM's `pretrain_gpt.py` has no such models.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import steps


LOGITS = Path(__file__).parents[1] / "families" / "logits.py"
NEAR = 1e-4  # of the largest logit
YARN = '{"rope_theta": 20000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}'
LINEAR = '{"rope_theta": 20000.0, "rope_type": "linear", "factor": 4.0}'
EVERY_OTHER = '["sliding_attention", "full_attention", "sliding_attention", "full_attention"]'
SWAPPED = '["full_attention", "sliding_attention", "full_attention", "sliding_attention"]'
# Rows of logits.py, and the words with which an import refuses one.
# What Megatron Core's own layers make is compared by Megatron-LM itself (variants.py).
ROWS = {
    "Exaone4ForCausalLM: rms_norm_eps=1e-3": None,
    "Exaone4ForCausalLM: sliding_window=8": None,
    f"Exaone4ForCausalLM: rope_parameters={YARN}": None,
    'Exaone4ForCausalLM: hidden_act="gelu"': "hidden_act is 'gelu', Bridge's model has silu",
    "Exaone4ForCausalLM: sliding_window=null": "sliding_window is None, and layer_types has 'sliding_attention'",
    "ExaoneMoEForCausalLM: sliding_window=8": None,
    "ExaoneMoeForCausalLM: norm_topk_prob=false": "norm_topk_prob is False, expected True",
    "FalconH1ForCausalLM": None,
    "Gemma2ForCausalLM: rms_norm_eps=1e-3": None,
    "Gemma2ForCausalLM: sliding_window=8": None,
    f"Gemma2ForCausalLM: layer_types={SWAPPED}": "sliding_window is [None, 4096, None, 4096], Bridge's model has",
    f"Gemma2ForCausalLM: rope_parameters={LINEAR}": None,
    'Gemma2ForCausalLM: hidden_activation="gelu"': "hidden_activation is 'gelu', Bridge's model has fast_gelu",
    "Gemma3ForCausalLM: rms_norm_eps=1e-3": None,
    f"Gemma3ForCausalLM: layer_types={EVERY_OTHER}": None,
    "Gemma3ForCausalLM: final_logit_softcapping=5.0": "final_logit_softcapping is 5.0, expected None",
    f"Gemma3ForCausalLM: rope_parameters.full_attention={LINEAR}": None,
    f"Gemma3ForCausalLM: rope_parameters.sliding_attention={LINEAR}": "of sliding_attention isn't that of",
    'GemmaForCausalLM: hidden_act="gelu"': None,
    "MiniMaxM2ForCausalLM: rms_norm_eps=1e-3": None,
    f"MiniMaxM2ForCausalLM: rope_parameters={LINEAR}": None,
    "MiniMaxM2ForCausalLM: num_experts_per_tok=1": "num_experts_per_tok is 1, expected another value",
    "Mistral3ForConditionalGeneration": None,
    "Mistral3ForConditionalGeneration with a text model of Mistral": None,
    "NemotronHForCausalLM": None,
    "OlmoeForCausalLM with fewer key and value heads": None,
    "Qwen2_5_VLForConditionalGeneration": None,
    "Qwen3NextForCausalLM": None,
    f"Qwen3NextForCausalLM: rope_parameters={LINEAR}": None,
    f"Qwen3NextForCausalLM: rope_parameters={YARN}": "rope_type is 'yarn', which Bridge's model doesn't have",
    'Qwen3_5ForCausalLM: hidden_act="gelu"': "hidden_act is 'gelu', Bridge's model has 'silu'",
    f"Qwen3VLForConditionalGeneration: rope_parameters={YARN}": "rope_type is 'yarn', which Bridge's model",
    'NemotronHForCausalLM: mlp_hidden_act="silu"': "mlp_hidden_act is 'silu', Bridge's model has 'relu2'",
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """Return how far the logits of each row are apart."""
    command = [sys.executable, str(LOGITS), *ROWS]
    done = subprocess.run(command, capture_output=True, text=True, env=steps.environment())
    found = {row["row"]: row for row in map(json.loads, done.stdout.splitlines())}
    return found or pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("model", [each for each, words in ROWS.items() if words is None])
def test_a_loaded_model_has_the_logits_of_transformers(rows: dict[str, dict], model: str) -> None:
    """Both compute in float32, on the same tokens."""
    assert "error" not in rows[model], rows[model]["error"]
    assert rows[model]["apart"] < NEAR


@pytest.mark.parametrize("model", [each for each, words in ROWS.items() if words])
def test_what_the_model_would_not_compute_is_refused(rows: dict[str, dict], model: str) -> None:
    """An import says what is in the way, and publishes nothing."""
    assert ROWS[model] in rows[model].get("error", f"imported, {rows[model].get('apart')} apart")
