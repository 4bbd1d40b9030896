# SPDX-License-Identifier: Apache-2.0
"""Values of config.json that are known to make another model, in families that have no table yet."""

from fork.change import Change


change = Change(
    name="unproved-config",
    message="""\
feat(model): list what Bridge's models of Qwen3-Next and more leave out

A Qwen3-Next or Qwen3-VL with YaRN in its config, as their model cards advise
for long texts, is imported without it.

Keep the RoPE scalings, activations, and options of routers that are known to
be left out, for families whose config.json has no table yet.
""",
    why="It is known what Bridge's models of Qwen3-Next, Qwen3.5, Qwen3-VL, Nemotron-H, and others leave out.",
    modules=["models/conversion/unproved_config.py"],
    problem="`AutoBridge.import_ckpt` of a Qwen3-Next with YaRN ends without an error, and with other logits.",
    changes=["Nothing yet: `config-check` refuses these values."],
    unchanged=["No existing file changes."],
    tested=["Logits of tiny models with each of these values, beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_unproved_config.py": "models/test_unproved_config.py"},
    stands_on=["rope-and-windows"],
)
