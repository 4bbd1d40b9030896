# SPDX-License-Identifier: Apache-2.0
"""Families that are imported when their architecture is asked for."""

import json
import subprocess
import sys

import pytest

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import families


REPORT = """
import json
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import families, model_bridge
registry = model_bridge.get_model_bridge._exact_types
from transformers import CONFIG_MAPPING
def configs():
    found = {name: kind for name, kind in CONFIG_MAPPING._extra_content.items() if "megatron" in kind.__module__}
    return {name: [kind.__module__, kind.__name__] for name, kind in found.items()}
report = {"early": configs()}
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
report["configs"] = configs()
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


def test_transformers_knows_the_configs_of_bridge(report):
    early, late = report["early"], report["configs"]
    assert early and early == {name: kind for name, kind in late.items() if name in early}
    assert set(late) - set(early) <= {"qwen3_asr"}


@pytest.mark.parametrize("name", ["from_hf_pretrained", "can_handle", "import_ckpt"])
def test_configs_are_registered_before_one_is_read(name, tmp_path, monkeypatch):
    class Registered(Exception):
        """Ends the call."""

    def register() -> None:
        raise Registered

    monkeypatch.setattr(families, "import_configs", register)
    (tmp_path / "config.json").write_text("{}")
    arguments = (tmp_path, tmp_path / "out") if name == "import_ckpt" else (tmp_path,)
    with pytest.raises(Registered):
        getattr(AutoBridge, name)(*arguments)
