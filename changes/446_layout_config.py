# SPDX-License-Identifier: Apache-2.0
"""What the keys of config.json mean in families whose layers ask for Transformer Engine."""

from fork.change import Change


change = Change(
    name="layout-config",
    message="""\
feat(model): list the config keys of Gemma 2 and 3, EXAONE, MiniMax-M2

Keep a table for each of these families, as for those that Megatron-LM's
pretrain_gpt.py has, and compare what is theirs alone: Gemma 3's two RoPEs
and EXAONE's layers without positions.
""",
    why="It is known what an import follows of the config.json of Gemma 2 and 3, EXAONE 4 and MoE, and MiniMax-M2.",
    modules=["models/conversion/layout_config.py"],
    problem="It is not known which keys of Gemma's, EXAONE's or MiniMax-M2's config.json `import_ckpt` follows.",
    changes=["Nothing yet: `config-check` reads the tables."],
    unchanged=["No existing file changes."],
    tested=["Logits of a tiny model with each key at another value, beside transformers', on the CPU."],
    tests={"tests/unit/bridge/test_layout_config.py": "models/test_layout_config.py"},
    stands_on=["config-keys", "rope-and-windows"],
)
