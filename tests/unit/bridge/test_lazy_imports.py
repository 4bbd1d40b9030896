# SPDX-License-Identifier: Apache-2.0
"""Imports of a package that wait until a name is used, in a made-up package and in Bridge."""

import builtins
import importlib
import subprocess
import sys
from pathlib import Path

import pytest


FILES = {
    "__init__.py": """
        from megatron.bridge.utils.lazy_imports import lazy_imports

        with lazy_imports(__name__):
            import json.decoder
            from .colors import BLUE, RED as SCARLET
            from lazy_shapes import module, forms
            from lazy_shapes.broken import anything
        __all__ = ["BLUE", "SCARLET"]
    """,
    "colors.py": "RED, BLUE = 'red', 'blue'",
    "module.py": "round = True",
    "forms/__init__.py": "",
    "broken.py": "from lazy_shapes import missing",
}


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Import a package whose `__init__` is lazy."""
    for name, text in FILES.items():
        path = tmp_path / "lazy_shapes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[8:] if line.startswith(" ") else line for line in text.split("\n")))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazy_shapes")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_shapes"]:
        del sys.modules[name]


def test_a_module_is_imported_when_one_of_its_names_is_used(shapes):
    assert "lazy_shapes.colors" not in sys.modules
    assert shapes.SCARLET == "red" and "lazy_shapes.colors" in sys.modules
    assert vars(shapes)["SCARLET"] == "red" and "BLUE" not in vars(shapes)
    assert "lazy_shapes.broken" not in sys.modules


def test_every_name_is_listed_before_it_is_used(shapes):
    assert {"BLUE", "SCARLET", "module", "anything", "__all__", "json"} <= set(dir(shapes))
    names = {}
    exec("from lazy_shapes import *", names)
    assert (names["BLUE"], names["SCARLET"]) == ("blue", "red")


def test_submodules_are_there_whether_named_or_not(shapes):
    assert shapes.module.round and shapes.forms is sys.modules["lazy_shapes.forms"]
    assert shapes.colors.BLUE == "blue"


def test_a_name_that_is_missing_is_an_attribute_error(shapes):
    with pytest.raises(AttributeError, match="module 'lazy_shapes' has no attribute 'missing'"):
        _ = shapes.missing
    with pytest.raises(ImportError, match="missing"):
        _ = shapes.anything
    assert not hasattr(shapes, "__wrapped__")


def test_imports_elsewhere_are_made_at_once(shapes):
    assert builtins.__import__.__name__ == "__import__"
    assert "json.decoder" in sys.modules and shapes.json is sys.modules["json"]


@pytest.mark.parametrize("module", ["megatron.bridge", "megatron.bridge.utils.lazy_imports"])
def test_bridge_imports_without_torch(module: str):
    code = f"import sys, {module}\nassert not sys.modules.keys() & {{'torch', 'transformers', 'megatron.core'}}"
    code += "\nimport megatron.bridge\nassert megatron.bridge.__version__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_of_bridge_is_there():
    bridge = importlib.import_module("megatron.bridge")
    assert [name for name in bridge.__all__ if not hasattr(bridge, name)] == []
    assert bridge.AutoBridge.__module__ == "megatron.bridge.models.conversion.auto_bridge"
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM"} < set(bridge.AutoBridge.list_supported_models())
