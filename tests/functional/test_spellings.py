# SPDX-License-Identifier: Apache-2.0
"""A model is imported whichever transformers has saved it: the names of tensors differ, the release doesn't.

These families have one spelling on the hub, and another where transformers has them in memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import steps


SPELLINGS = Path(__file__).parents[1] / "families" / "spellings.py"
# transformers 4.57 has all but the last two: its Mistral 3 has a text model of Mistral alone.
ARCHITECTURES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Mistral3ForConditionalGeneration with a text model of Mistral",
    "Mistral3ForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
)
IN_TRANSFORMERS_4 = ARCHITECTURES[:4]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return what is wrong with each spelling of each architecture."""
    command = [sys.executable, str(SPELLINGS), str(tmp_path_factory.mktemp("spellings")), *ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True, env=steps.environment())
    found = {line["architecture"]: line for line in map(json.loads, done.stdout.splitlines())}
    return found if len(found) == len(ARCHITECTURES) else pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_spelling_gives_the_same_release(results: dict[str, dict], architecture: str) -> None:
    """The names of the hub, of transformers' memory, and of transformers 4 stand for the same tensors."""
    wrong = results[architecture]["wrong"]
    assert set(wrong.values()) == {""}, wrong
    by_4 = os.environ.get("TRANSFORMERS_4_PYTHON") and architecture in IN_TRANSFORMERS_4
    assert wrong.keys() >= ({"saved", "in-memory", "saved-by-4"} if by_4 else {"saved"})
