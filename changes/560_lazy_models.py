# SPDX-License-Identifier: Apache-2.0
"""megatron.bridge.models imports a family when one of its names is used."""

from fork.change import Change
from fork.edits import File, wrap_imports


LAZY = """
from megatron.bridge.utils.lazy_imports import lazy_imports


with lazy_imports(__name__):
    {}
"""

change = Change(
    name="lazy-models",
    message="""\
perf(model): import a family when it is used

`megatron.bridge.models` imported every family, with what each of them needs.

Import the names of the package when they are used. AutoBridge finds a family
by its architecture.
""",
    why="`from megatron.bridge import AutoBridge` imports no family that it doesn't convert.",
    edits=[
        File("models/__init__.py", [wrap_imports(LAZY)]),
        # It registers a configuration, and so it is imported for every model.
        File("models/qwen3_asr/__init__.py", [wrap_imports(LAZY, releases=">=0.6")]),
    ],
    limit=600,
    limit_reason="It moves 180 lines of imports four columns to the right.",
    problem="""\
`python -c "from megatron.bridge import AutoBridge"` imports every family for the conversion of one model.
""",
    changes=["`from megatron.bridge import AutoBridge` imports a family when AutoBridge gets a model of it."],
    unchanged=["Every public name of the package."],
    tested=["The public names are there; a process that asks for Llama has loaded no Gemma."],
    tests={"tests/unit/bridge/test_lazy_models.py": "models/"},
    stands_on=["families", "lazy-conversion"],
)
