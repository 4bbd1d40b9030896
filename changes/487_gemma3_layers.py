# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and 3 have the layers with and without windows that their configs say."""

from fork.change import Change
from fork.edits import File, assign, expression, insert_after, replace


PATTERN = """\
kinds = {config}.layer_types
local = next((place for place, kind in enumerate(kinds) if kind == "full_attention"), len(kinds))
provider.interleaved_attn_pattern = (local, 1)
"""
PLACE = "self.layer_number % 2"

change = Change(
    name="gemma3-layers",
    message="""\
fix(model): follow layer_types of Gemma 3

Every Gemma 3 got five layers with a window for one without. The config may
have another pattern.
""",
    why="Gemma 3 has as many layers with a window between two without as its config says, and Gemma 2 over Bridge 0.3 to "
    "0.5 has its windows in the layers that have them.",
    edits=[
        *(
            File(
                f"models/{folder}_bridge.py",
                [
                    insert_after(
                        f"{bridge}.provider_bridge",
                        assign("provider.window_size"),
                        PATTERN.format(config=config),
                    )
                ],
            )
            for folder, bridge, config in (
                ("gemma/gemma3", "Gemma3ModelBridge", "hf_config"),
                ("gemma_vl/gemma3_vl", "Gemma3VLBridge", "text_config"),
            )
        ),
        # What upstream has mended since.
        *(
            File(f"models/gemma/{file}.py", [replace(scope, expression(before), after, releases=releases)])
            for file, scope, before, after, releases in (
                ("gemma2_provider", "Gemma2DotProductAttention.__init__", f"{PLACE} == 0", f"{PLACE} == 1", "<0.6"),
                (
                    "gemma2_bridge",
                    "Gemma2Bridge.provider_bridge",
                    "(hf_config.sliding_window, 0)",
                    "(hf_config.sliding_window - 1, 0)",
                    "<0.4",
                ),
                (
                    "gemma3_provider",
                    "Gemma3TEDotProductAttention.__init__",
                    "(config.window_size, 0)",
                    "(config.window_size - 1, 0)",
                    "<0.4",
                ),
            )
        ),
    ],
    problem="`AutoBridge.import_ckpt` of a Gemma 3 with another `sliding_window_pattern` than 6 ends without an error, "
    "and the logits are another model's.",
    changes=["The bridges of Gemma 3 set `interleaved_attn_pattern` from `layer_types`."],
    unchanged=["Published models, which have five layers with a window for one without."],
    tested=["Logits of tiny models with other patterns beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_gemma3_layers.py": "models/"},
)
