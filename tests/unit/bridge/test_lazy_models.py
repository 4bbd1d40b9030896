# SPDX-License-Identifier: Apache-2.0
"""megatron.bridge.models imports a family when one of its names, or its architecture, is asked for."""

import subprocess
import sys


ONE_FAMILY = """
import sys
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import families
early = [name for name in families.FAMILIES if families._is_registered(name)]
# A family that registers a configuration with transformers is imported early: Qwen3-ASR, with its Qwens.
assert len(early) < 20 and "LlamaForCausalLM" not in early, early
families.import_family("LlamaForCausalLM")
assert families._is_registered("LlamaForCausalLM")
assert not [name for name in sys.modules if name.startswith("megatron.bridge.models.gemma.")]
import megatron.bridge.models as models
assert not [name for name in models.__all__ if not hasattr(models, name)]
"""


def test_a_family_is_imported_when_it_is_asked_for():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ONE_FAMILY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
