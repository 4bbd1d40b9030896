# SPDX-License-Identifier: Apache-2.0
"""`import megatron.bridge` imports nothing until a name is used."""

from fork.change import Change
from fork.edits import File, call, imports, insert_before, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""

# ModelOpt imports Megatron Core, and up to 0.46 Bridge too: it has to come first where a package imports its modules.
MODELOPT = """
try:
    import modelopt.torch  # noqa: F401
except ImportError:
    pass
"""

change = Change(
    name="lazy-package",
    message="""\
perf: import megatron.bridge without importing its dependencies

`import megatron.bridge` took ten seconds and more: it imported AutoBridge
with every family, and with them torch, transformers and Megatron Core, for
whoever wanted a module below it.

Import the names of the package when they are used, by the module-level
`__getattr__` of PEP 562.
""",
    why="A module below megatron.bridge that needs no torch imports in milliseconds.",
    edits=[
        File("__init__.py", [wrap_imports(LAZY)]),
        File(
            "models/__init__.py",
            [
                insert_before(
                    "",
                    imports("megatron.bridge.models.bailing"),
                    MODELOPT,
                    done=call("lazy_imports"),
                    releases=">=0.7",
                )
            ],
        ),
    ],
    modules=["utils/lazy_imports.py"],
    problem="""\
`python -c "import megatron.bridge"` takes ten seconds and more, whoever imports it and whatever for: the package imports
AutoBridge with every family, and with them torch, transformers and Megatron Core. A tool that only looks at a checkpoint's
metadata pays for all of that.
""",
    unchanged=["Every public name of the package, and `AutoBridge.list_supported_models()`."],
    changes=[
        "`import megatron.bridge` takes milliseconds and imports no torch; `AutoBridge` and the other names of the "
        "package are imported when they are used.",
    ],
    notes=[
        "`import modelopt.torch` moves into `megatron.bridge.models`, which still imports its modules at once. ModelOpt 0.46 "
        "imports Bridge, and failed when that was half imported (#5192). Packages that import nothing have no such cycle, "
        "so the import goes with the change that makes `megatron.bridge.models` lazy.",
    ],
    tested=["Every public name of the package is there; a module below it imports without torch."],
    tests={"tests/unit/bridge/test_lazy_imports.py": "utils/"},
    stands_on=["families"],
)
