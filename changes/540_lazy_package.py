# SPDX-License-Identifier: Apache-2.0
"""`import megatron.bridge` imports nothing until a name is used."""

from fork.change import Change
from fork.edits import File, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""

change = Change(
    name="lazy-package",
    message="""\
perf: import megatron.bridge without importing its dependencies

`import megatron.bridge` took ten seconds and more: it imported AutoBridge
with every family, and with them torch, transformers and Megatron Core, for
whoever wanted a module below it. Its names are now imported when they are
used, by the module-level `__getattr__` of PEP 562.
""",
    why="A module below megatron.bridge that needs no torch imports in milliseconds.",
    edits=[
        File("__init__.py", [wrap_imports(LAZY)]),
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
    tested=["Every public name of the package is there; a module below it imports without torch."],
    tests={"tests/unit/bridge/test_lazy_imports.py": "utils/"},
    stands_on=["families"],
)
