# SPDX-License-Identifier: Apache-2.0
"""An OLMoE with fewer key and value heads than query heads converts."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, pass_argument


KEY_NORM = m.Call(
    func=m.Name("build_module"), args=[m.Arg(value=m.Attribute(attr=m.Name("k_layernorm"))), m.ZeroOrMore()]
)

change = Change(
    name="olmoe-key-norm",
    message="""\
fix(model): give OLMoE's norm of keys the size of the keys

The norm of keys had the size of the queries, so a model with fewer key and
value heads than query heads couldn't be converted.

Give it the size of the keys.
""",
    why="An OLMoE with grouped queries converts and trains.",
    edits=[
        File(
            "models/olmoe/olmoe_provider.py",
            [
                pass_argument(
                    "OLMoESelfAttention.__init__",
                    KEY_NORM,
                    "hidden_size=self.hidden_size_per_attention_head * self.config.num_query_groups",
                ),
            ],
        )
    ],
    problem=(
        "`AutoBridge.import_ckpt` of an OLMoE with fewer key and value heads than query heads stops at the shape of the "
        "norm of keys."
    ),
    changes=["The norm of keys has the size of all keys."],
    unchanged=["Models with as many key and value heads as query heads, as published."],
    tested=["Import, export, and logits of a tiny model on the CPU."],
    tests={"tests/unit/bridge/test_olmoe_key_norm.py": "models/"},
)
