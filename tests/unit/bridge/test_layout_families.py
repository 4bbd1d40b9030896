# SPDX-License-Identifier: Apache-2.0
"""Which models convert in a process with the layout of Transformer Engine's modules."""

import subprocess
import sys

import pytest
import transformers
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.host import own_process
from megatron.bridge.models.conversion import layout_families


@pytest.fixture
def ran(monkeypatch):
    """What would run in a process of its own."""
    calls = []
    monkeypatch.setattr(
        own_process, "run", lambda convert, args, kwargs: calls.append((convert.__name__, args, kwargs))
    )
    monkeypatch.setattr(layout_families.stand_ins, "are_needed", lambda: True)
    return calls


def config(name, **values):
    return {"architectures": [name], **values}


def test_a_family_is_made_of_own_layers_or_not():
    assert not layout_families.needs_layout(config("LlamaForCausalLM"))
    assert layout_families.needs_layout(config("Gemma3ForCausalLM"))


def test_variants_of_a_family_may_differ():
    assert layout_families.needs_layout(config("HYV3ForCausalLM", num_nextn_predict_layers=1))
    assert not layout_families.needs_layout(config("DeepseekV3ForCausalLM", num_nextn_predict_layers=1))


@pytest.mark.parametrize("unknown", [{}, {"architectures": None}, config("OwnForCausalLM")])
def test_what_bridge_does_not_know_stays_in_this_process(unknown):
    assert not layout_families.needs_layout(unknown)


def test_import_and_export_run_where_they_can(ran, tmp_path):
    hf = tmp_path / "hf"
    transformers.Gemma2Config(architectures=["Gemma2ForCausalLM"]).save_pretrained(hf)
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=False)
    AutoBridge.from_hf_config(transformers.AutoConfig.from_pretrained(hf)).export_ckpt("out", hf_path="back")
    (imported, exported) = ran
    assert imported == ("import_ckpt", (AutoBridge, hf, tmp_path / "out"), {"streaming": False})
    assert (exported[0], exported[1][1:], exported[2]) == ("export_ckpt", ("out",), {"hf_path": "back"})


def test_llama_stays_in_this_process(ran, tmp_path):
    AutoBridge.import_ckpt(save_hf_model(tmp_path / "hf"), tmp_path / "out")
    assert not ran and (tmp_path / "out" / "release").is_dir()


def test_a_config_that_is_not_there_is_an_error_of_the_import(ran, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        AutoBridge.import_ckpt(tmp_path / "none", tmp_path / "out")
    assert not ran


IN_A_COMMAND = """
import sys
from megatron.bridge.host import stand_ins
from megatron.bridge.models.conversion import layout_families
stand_ins.are_needed = lambda: True
layout_families.install_for(sys.argv[1])
assert "megatron.core" not in sys.modules
print(stand_ins.are_installed())
"""


@pytest.mark.parametrize("name, installed", [("Gemma2", True), ("Llama", False), (None, False)])
def test_a_command_has_the_stand_ins_itself(name, installed, tmp_path):
    if name:
        getattr(transformers, f"{name}Config")(architectures=[f"{name}ForCausalLM"]).save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", IN_A_COMMAND, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [str(installed)]


def test_a_process_with_megatron_core_stays_as_it_is(ran, tmp_path):
    transformers.Gemma2Config(architectures=["Gemma2ForCausalLM"]).save_pretrained(tmp_path)
    layout_families.install_for(tmp_path)
    assert not layout_families.stand_ins.are_installed()
