# SPDX-License-Identifier: Apache-2.0
"""A model that can't be converted is refused with one line that says why."""

import libcst as cst

from fork.change import Change, insert_before_heading
from fork.edits import File, Node, add_import, decorate, replace


def raising(text: str) -> Node:
    """A raise statement whose message holds `text`."""

    def matches(node: cst.CSTNode) -> bool:
        return isinstance(node, cst.Raise) and text in cst.Module([]).code_for_node(node)

    return Node(f"raise of {text!r}", matches, (cst.Raise,), text)


GUIDE = """\
### Hosts without a GPU

Import and export don't need a GPU, Transformer Engine, or Triton. Without them, process groups start on Gloo, and models
are built from Megatron Core's own layers. The checkpoint also has the keys that a model with Transformer Engine loads.
A model that needs Transformer Engine or a GPU for its conversion is refused with an error that says so.

"""

change = Change(
    name="conversion-errors",
    message="""\
fix(model): say in one line why a model can't be converted

A model that needs Transformer Engine or a GPU failed somewhere in Megatron
Core, with an error that doesn't say so. An architecture without a bridge was
answered with thirty lines and a template of a bridge.
""",
    why="An error should say what was found, what was expected, and what to do.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.host.missing import explain_missing"),
                decorate("AutoBridge.to_megatron_model", "explain_missing"),
                decorate("AutoBridge.load_megatron_model", "explain_missing"),
                replace(
                    "AutoBridge._validate_config",
                    raising("Model architecture not supported by AutoBridge"),
                    """raise ValueError(
    f"Model architecture not supported by AutoBridge: {path} has {architectures}, "
    f"expected one that ends in {SUPPORTED_HF_ARCHITECTURES_DISPLAY}"
)""",
                ),
                replace(
                    "AutoBridge._validate_config",
                    raising("is not yet supported"),
                    """raise ValueError(
    f"{path} has the architecture {architecture}, which is not yet supported: "
    f"Megatron Bridge has no bridge for it. AutoBridge.list_supported_models() lists all "
    f"{len(supported_models)} architectures"
) from None""",
                ),
            ],
        )
    ],
    modules=["host/missing.py"],
    issues=[3295],
    stands_on=["accelerator"],
    problem=(
        "Some models can't be converted without Transformer Engine or a GPU. `AutoBridge.import_ckpt` of such a model ends "
        "in an error from Megatron Core, for example `'NoneType' object is not callable`. An architecture without a bridge "
        "is answered with thirty lines."
    ),
    changes=[
        "An error that comes from a missing Transformer Engine or accelerator says so in one line.",
        "An architecture without a bridge is refused with one line, which names `list_supported_models()`, in place of the "
        "list and a template of a bridge.",
    ],
    unchanged=["Other errors.", "The type of the errors for architectures without a bridge."],
    tested=["Unit tests on a CPU host."],
    tests={"tests/unit/bridge/host/test_conversion_errors.py": "host/"},
    docs=[insert_before_heading("docs/bridge-guide.md", "### Megatron → HF export (one call)", GUIDE)],
)
