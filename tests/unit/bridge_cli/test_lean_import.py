# SPDX-License-Identifier: Apache-2.0
"""The import for one architecture: what it loads, and that everything else is there when it is asked for."""

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.bridge.cli.lean_import import GATHERING, _Distributions, _imported


# What `import megatron.bridge` spends its time on, and a conversion never calls.
HEAVY = [
    *("accelerate", "datasets", "megatron.energon", "modelopt", "pandas"),
    *("peft", "scipy", "sklearn", "tensorboard", "torch._inductor.lowering"),
]

# Of each registered architecture, the module of its bridge and the modules that the sources name.
WHOLE = """
import inspect, json, sys, torch
from megatron.bridge.cli.lean_import import auto_bridge_for, registering
compile_now = torch.compile
assert auto_bridge_for(sys.argv[1]) is __import__("megatron.bridge").bridge.AutoBridge
assert torch.compile is compile_now
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("megatron")]
import accelerate
assert accelerate.__file__
from megatron.bridge.models.conversion.model_bridge import get_model_bridge
registered = {}
for source, implementation in get_model_bridge._exact_types.items():
    bridge = inspect.getclosurevars(implementation).nonlocals["bridge_class"]
    name = source if isinstance(source, str) else source.__name__
    registered[name] = bridge.__module__, registering({name})
print(json.dumps(registered))
"""

# The bridges of all architectures, one module after the other, as `auto_bridge_for` imports the one that it finds.
EVERY = """
import importlib, json, sys, torch
from megatron.bridge.cli import lean_import
lean_import._compile_on_call()
sys.meta_path.insert(0, lean_import._Finder())
for module in (lean_import.AUTO_BRIDGE, *json.loads(sys.argv[1])):
    importlib.import_module(module)
from megatron.bridge.models.conversion.model_bridge import get_model_bridge
print(json.dumps([key if isinstance(key, str) else key.__name__ for key in get_model_bridge._exact_types]))
"""

# A stand-in has no file.
LEAN = """
import collections, importlib.metadata, json, sys
opened, distributions = collections.Counter(), importlib.metadata.packages_distributions
sys.addaudithook(lambda event, args: opened.update([str(args[0])]) if event == "open" else None)
from megatron.bridge.cli.lean_import import auto_bridge_for
auto_bridge = auto_bridge_for(sys.argv[1])
bridge = auto_bridge.from_hf_config(__import__("transformers").AutoConfig.from_pretrained(sys.argv[1]))
import megatron.bridge.training.model_load_save
assert importlib.metadata.packages_distributions is distributions
assert sum(number for path, number in opened.items() if path.endswith("transformers/models/t5/modeling_t5.py")) == 1
assert not [path for path in opened if path.endswith("/RECORD")]
loaded = [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]

from megatron.bridge import __version__
from megatron.bridge.models import GPTModelProvider, conversion
assert GPTModelProvider.__module__ == "megatron.bridge.models.gpt_provider" and conversion.AutoBridge is auto_bridge
try:
    from megatron.bridge import nothing
except ImportError:
    pass

import scipy.optimize
from scipy.optimize import Bounds, linear_sum_assignment
assert "scipy.optimize" not in loaded and not isinstance(bridge, Bounds)
class Tight(Bounds): pass
assert linear_sum_assignment([[1.0]])[0] == [0] and isinstance(Tight(0, 1), scipy.optimize.Bounds)

import torch
double = torch.compile(backend="eager")(lambda value: 2 * value)
assert double(torch.ones(())) == 2
print(json.dumps({"loaded": loaded, "bridge": type(bridge._model_bridge).__name__}))
"""


def run(code: str, *arguments: str) -> dict:
    """What `code` prints as its last line, in JSON, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def hf_folder(folder: Path, **config) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The registrations after an architecture that no source names, which takes the whole import."""
    return run(WHOLE, hf_folder(tmp_path_factory.mktemp("unknown"), architectures=["SomeForCausalLM"]))


def test_an_unknown_architecture_gets_every_bridge(whole):
    assert {"LlamaForCausalLM", "DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"} < set(whole)


def test_sources_name_the_module_that_registers_an_architecture(whole):
    wrong = {name: found for name, (module, found) in whole.items() if found not in ([module], [])}
    assert not wrong
    unseen = {name for name, (_, found) in whole.items() if not found}
    assert len(unseen) < len(whole) / 10, unseen


def test_every_bridge_that_is_found_can_be_imported_so(whole):
    modules = {name: module for name, (module, found) in whole.items() if found}
    assert set(modules) <= set(run(EVERY, json.dumps(sorted(set(modules.values())))))


def test_a_llama_loads_no_other_family_and_nothing_that_only_training_needs(whole, tmp_path):
    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf_model = hf_folder(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama", **values)
    lean = run(LEAN, hf_model)
    assert lean["bridge"] == "LlamaBridge"
    families = {module.rpartition(".")[0] for module, _ in whole.values()} - {"megatron.bridge.models.llama"}
    unwanted = [*families, *HEAVY]
    assert not [name for name in lean["loaded"] if any(f"{name}.".startswith(f"{each}.") for each in unwanted)]
    assert len(lean["loaded"]) < 4000


@pytest.mark.parametrize("package", [name for name in GATHERING if name.startswith("megatron.bridge")])
def test_a_gathering_package_defines_nothing_itself(package):
    path = Path(importlib.util.find_spec("megatron.bridge").origin).parents[1]
    init = ast.parse((path.joinpath(*package.split(".")[1:]) / "__init__.py").read_text())
    public = [ast.literal_eval(node.value) for node in init.body if isinstance(node, ast.Assign)]
    imported = dict(_imported(init, package))
    assert all(name in imported for names in public for name in names)


def test_distributions_are_those_that_the_standard_library_finds():
    look = importlib.metadata.packages_distributions
    known, looked = look(), []
    found = _Distributions(lambda: looked.append("once") or look())
    assert found["torch"] == ["torch"] and not looked
    assert {package for package in known if not set(found[package]) <= set(known[package])} == set()
    assert set(found) == set(known) and len(found) == len(known)
    assert found.get("no_such_package") is None and looked == ["once"]
