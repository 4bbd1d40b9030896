# SPDX-License-Identifier: Apache-2.0
"""The packages of conversion, data and diffusion import a name when it is used."""

from fork.change import Change
from fork.edits import File, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""

change = Change(
    name="lazy-conversion",
    message="""\
perf(model): import AutoBridge only where it is used

Every module below `models/conversion` imported AutoBridge, and every dataset
all builders, by the packages that gather their names.

Import these names when they are used. A module below such a package then
imports only what it needs, and any of them can be the first.
""",
    why="A module of Bridge that needs no AutoBridge imports none.",
    edits=[
        File("models/conversion/__init__.py", [wrap_imports(LAZY)]),
        File("diffusion/models/__init__.py", [wrap_imports(LAZY, releases=">=0.5")]),
        File("data/__init__.py", [wrap_imports(LAZY, releases=">=0.6")]),
    ],
    problem="""\
`import megatron.bridge.models.conversion.utils` imports AutoBridge, since the package gathers names from all its modules.
Modules below it that AutoBridge needs itself can then only be imported in a certain order.
""",
    changes=["The names of `models.conversion`, `data` and `diffusion.models` are imported when they are used."],
    unchanged=["Every public name."],
    tested=["Modules of each kind, each as the first that a process imports."],
    tests={"tests/unit/bridge/test_first_import.py": "models/"},
    stands_on=["lazy-package"],
)
