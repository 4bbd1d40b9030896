# SPDX-License-Identifier: Apache-2.0
"""A family is imported when its architecture is asked for."""

from fork.change import Change
from fork.edits import File, add_import, call, define, ifs, insert_after, insert_before, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""
REGISTRY = 'hasattr(model_bridge.get_model_bridge, "_exact_types")'

change = Change(
    name="lazy-families",
    message="""\
perf(model): import a family when its architecture is asked for

`from megatron.bridge import AutoBridge` imported every family, with what
each of them needs, for the conversion of one model. The packages that gather
their names import each when it is used, and AutoBridge finds the module of
an architecture in a table. A test fails when a family is not in the table;
such a family is found all the same, by importing all.
""",
    why="AutoBridge imports the bridge of the model that it converts, and no other.",
    edits=[
        File("models/__init__.py", [wrap_imports(LAZY)]),
        # Without AutoBridge behind every module of it, any module of Bridge can be the first that is imported.
        File("models/conversion/__init__.py", [wrap_imports(LAZY)]),
        File("diffusion/models/__init__.py", [wrap_imports(LAZY, releases=">=0.5")]),
        File("data/__init__.py", [wrap_imports(LAZY, releases=">=0.6")]),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import families"),
                insert_after("", define("AutoBridge"), "families.import_configs()"),
                insert_before("AutoBridge.list_supported_models", ifs(REGISTRY), "families.import_all()"),
                insert_before("AutoBridge._validate_config", ifs(REGISTRY), "families.import_family(arch_key)"),
                insert_before(
                    "AutoBridge._model_bridge",
                    call("model_bridge.get_model_bridge"),
                    "families.import_family(self._causal_lm_architecture)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/families.py"],
    changes=[
        "`from megatron.bridge import AutoBridge` imports no family; a family is imported when AutoBridge gets a model "
        "of it.",
    ],
    unchanged=["`AutoBridge.list_supported_models()` and every public name of the packages."],
    tested=["Every architecture finds its bridge alone; the public names are those of before."],
    tests={"tests/unit/bridge/test_families.py": "models/"},
    stands_on=["lazy-package"],
)
