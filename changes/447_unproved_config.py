# SPDX-License-Identifier: Apache-2.0
"""import_ckpt refuses what is known to make another model, in families whose config.json has no table yet."""

from fork.change import Change
from fork.edits import File, assign, insert_after


change = Change(
    name="unproved-config",
    message="""\
feat(ckpt)!: refuse what is known to make another model of Qwen3-Next

A Qwen3-Next or Qwen3-VL with YaRN in its config, as their model cards advise
for long texts, was imported without it, and with the warning that its keys
were never compared.

Compare those keys that are known to be left out, in twelve such families.
""",
    why="An import of Qwen3-Next, Qwen3.5, Qwen3-VL, Nemotron-H, and others refuses what Bridge's model leaves out.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.import_ckpt",
                    assign("bridge"),
                    "from megatron.bridge.models.conversion.unproved_config import check_unproved\n"
                    "\n"
                    "check_unproved(bridge, strict)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/unproved_config.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Qwen3-Next with YaRN ends without an error. The logits differ by half of the "
        "largest one."
    ),
    changes=[
        "`import_ckpt` refuses RoPE scalings, activations, and options of routers that Bridge's models of these "
        "families don't have. With `strict=False`, it warns."
    ],
    unchanged=["The configs of published models are imported."],
    tested=["Logits of tiny models with each of these values, beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_unproved_config.py": "models/test_unproved_config.py"},
    stands_on=["config-check", "published-configs"],
)
