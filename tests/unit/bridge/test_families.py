# SPDX-License-Identifier: Apache-2.0
"""Families that are imported when their architecture is asked for."""

import json
import subprocess
import sys

import pytest


REPORT = """
import json, sys
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import families, model_bridge
registry = model_bridge.get_model_bridge._exact_types
report = {"early": [name for name in families.FAMILIES if families._is_registered(name)]}
families.import_family("LlamaForCausalLM")
report["llama"] = [name for name in sys.modules if name.startswith("megatron.bridge.models.gemma.")]
llama = next(key for key in registry if getattr(key, "__name__", key) == "LlamaForCausalLM")
registry[llama] = mine = lambda *args, **kwargs: "mine"
report["alone"] = []
for name, module in families.FAMILIES.items():
    families._import(module)
    report["alone"] += [name] * families._is_registered(name)
report["supported"] = AutoBridge.list_supported_models()
report["kept"] = registry[llama] is mine
families.import_family("NobodysForCausalLM")
report["families"] = sorted(families.FAMILIES)
import megatron.bridge.models as models
report["missing"] = [name for name in models.__all__ if not hasattr(models, name)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict:
    """Give what a process finds that asks for one family, and then for all."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_family_is_imported_when_it_is_asked_for(report):
    # A family that registers a configuration with transformers is imported early: Qwen3-ASR, with its Qwens.
    assert len(report["early"]) < 20 and "LlamaForCausalLM" not in report["early"]
    assert not report["llama"]


def test_the_table_has_every_family(report):
    assert report["supported"] == report["families"]


def test_each_module_of_the_table_registers_its_architecture(report):
    assert sorted(report["alone"]) == report["families"]


def test_a_bridge_of_the_users_own_stays(report):
    assert report["kept"]


@pytest.mark.parametrize("module", ["data.loaders", "models.hf_pretrained", "training.config", "training.pretrain"])
def test_any_module_can_be_the_first_that_is_imported(module: str):
    command = [sys.executable, "-W", "ignore", "-c", f"import megatron.bridge.{module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_public_name_is_there(report):
    assert report["missing"] == []
