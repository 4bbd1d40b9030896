# SPDX-License-Identifier: Apache-2.0
"""Gemma has the activation that its config names."""

from fork.change import Change
from fork.edits import File, assign, replace_up_to


change = Change(
    name="gemma-activation",
    message="""\
fix(model): give Gemma the activation that its config names

Some configs of Gemma name the exact GELU, and transformers computes it.
GemmaBridge had the approximation by tanh for all of them, or the exact one
for all of them.

Follow `hidden_act`.
""",
    why="An imported Gemma computes what transformers computes, also with the exact GELU.",
    edits=[
        File(
            "models/gemma/gemma_bridge.py",
            [
                replace_up_to(
                    "GemmaBridge.provider_bridge",
                    assign("provider.activation_func"),
                    assign("provider.gated_linear_unit"),
                    "# As `GemmaMLP` of transformers, which doesn't read `hidden_activation`.\n"
                    "provider.activation_func = self.hf_to_megatron_activation(hf_pretrained.config.hidden_act)",
                )
            ],
        )
    ],
    problem=(
        "`AutoBridge.import_ckpt` of a Gemma with `hidden_act: gelu` ends without an error. The model computes the "
        "approximation by tanh, and transformers the exact GELU."
    ),
    changes=["GemmaBridge follows `hidden_act`."],
    unchanged=["Gemma with `gelu_pytorch_tanh`."],
    tested=["Logits of a tiny model beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_gemma_activation.py": "models/gemma/"},
    stands_on=["config-check"],
)
