# SPDX-License-Identifier: Apache-2.0
"""import_ckpt refuses a config.json that transformers can't compute."""

from fork.change import Change
from fork.edits import File, assign, insert_after


change = Change(
    name="config-values",
    message="""\
fix(ckpt)!: refuse a config.json that transformers can't compute

A sliding layer without a window, a padding token beyond the vocabulary, an
activation that transformers doesn't have, or a negative epsilon was imported
with exit code 0, and the export of such a model couldn't be loaded. Sizes of
zero ended in a ZeroDivisionError.

Look at the values before a provider is made of them. What transformers can't
compute is an error of one line, or a warning with strict=False.
""",
    why="An import ends with a model that transformers can compute, too, or says why it can't.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.import_ckpt",
                    assign("bridge"),
                    "from megatron.bridge.models.conversion.config_values import check_values\n"
                    "\n"
                    "check_values(bridge, strict)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/config_values.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Qwen2 with sliding layers and `sliding_window: null`, or with a `pad_token_id` "
        "of 32000 and a vocabulary of 32000, ends without an error. transformers loads neither."
    ),
    changes=[
        "`import_ckpt` refuses sizes, norm epsilons, activations, windows, padding tokens, heads, and numbers of "
        "experts with which transformers can't compute the model. With `strict=False`, it warns."
    ],
    unchanged=["The configs of published models are imported."],
    tested=["A thousand values of config.json over 14 families, with what transformers computes of each."],
    tests={"tests/unit/bridge/test_values_without_model.py": "models/test_values_without_model.py"},
    stands_on=["config-check", "published-configs"],
)
