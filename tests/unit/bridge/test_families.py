# SPDX-License-Identifier: Apache-2.0
"""Families that are imported when their architecture is asked for."""

import json
import subprocess
import sys

import pytest


REPORT = """
import json
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import families, model_bridge
registry = model_bridge.get_model_bridge._exact_types
report = {}
families.import_family("LlamaForCausalLM")
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
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict:
    """Give what a process finds that asks for one family, and then for all."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_table_has_every_family(report):
    assert set(report["supported"]) <= set(report["families"])


def test_each_module_of_the_table_registers_its_architecture(report):
    assert sorted(report["alone"]) == report["supported"]


def test_a_bridge_of_the_users_own_stays(report):
    assert report["kept"]
