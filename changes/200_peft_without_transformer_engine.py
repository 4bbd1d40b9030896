# SPDX-License-Identifier: Apache-2.0
"""`import megatron.bridge` needs no Transformer Engine."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, add_import, imports, insert_before, wrap


ALL_TRANSFORMER_ENGINE_CLASSES = m.Call(
    func=m.Name("all"),
    args=[m.Arg(value=m.Tuple(elements=[m.Element(value=m.Name("HAVE_TE_COL_LINEAR")), m.ZeroOrMore()]))],
)
# Before 0.6 the class of an adapter is made from Transformer Engine's Linear, and modules are compared with it.
WITHOUT_LINEAR = [
    add_import("from types import SimpleNamespace", releases="<0.6"),
    wrap(
        "",
        imports("transformer_engine.pytorch"),
        "try:\n    {}\nexcept ImportError:\n    te = SimpleNamespace(Linear=nn.Module)",
        releases="<0.6",
    ),
]

change = Change(
    name="peft-without-transformer-engine",
    message="""\
fix(peft): import Bridge without Transformer Engine

`import megatron.bridge` failed where Transformer Engine is not installed,
because the LoRA layers import it at module level.

Import it only where it is installed. Adapters of Megatron Core's own linear
layers don't need it.
""",
    why="Bridge can be imported without Transformer Engine, and LoRA wraps Megatron Core's own linear layers.",
    edits=[
        File(
            "peft/lora_layers.py",
            [
                insert_before("", imports("math"), "from __future__ import annotations\n"),
                wrap(
                    "",
                    imports("transformer_engine.pytorch"),
                    "try:\n    {}\nexcept ImportError:\n    te = None",
                    releases=">=0.6",
                ),
                *WITHOUT_LINEAR,
            ],
        ),
        File("peft/lora.py", WITHOUT_LINEAR),
        File(
            "peft/utils.py",
            [
                # Megatron Core has names for Transformer Engine's classes where it has none of them.
                add_import("from megatron.core.extensions.transformer_engine import HAVE_TE as MCORE_HAVE_TE"),
                wrap("", ALL_TRANSFORMER_ENGINE_CLASSES, "MCORE_HAVE_TE and {}"),
            ],
        ),
    ],
    issues=[3295],
    problem=(
        "On a host without Transformer Engine, `python -c 'import megatron.bridge'` ends in an ImportError: "
        "`peft/lora_layers.py` imports `transformer_engine.pytorch` at module level. Nothing that follows needs it: "
        "conversion, for example, only moves weights."
    ),
    changes=[
        "`import megatron.bridge` works without Transformer Engine.",
        "LoRA wraps the linear layers of Megatron Core there.",
    ],
    unchanged=["Hosts with Transformer Engine."],
    tested=[
        "On a CPU host without Transformer Engine: the test in this pull request, which skips itself elsewhere, and an "
        "adapter that is trained, saved, and exported bit for bit.",
    ],
    tests={"tests/unit/bridge/host/test_peft_without_transformer_engine.py": "peft/"},
)
