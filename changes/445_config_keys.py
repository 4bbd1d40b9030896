# SPDX-License-Identifier: Apache-2.0
"""What the keys of config.json mean for Megatron Core's model, as data."""

from fork.change import Change


change = Change(
    name="config-keys",
    message="""\
feat(model): list what the keys of config.json mean for Megatron Core

Nothing says which keys of a config.json a bridge carries over, which change
what the model computes, and which mean nothing.

Keep a table for each family whose keys were compared, and the reason for each
family that computes something else in Megatron Core.
""",
    why="It is known, key by key, what an import follows of config.json.",
    modules=["models/conversion/config_keys.py"],
    problem="It is not known which keys of a config.json `AutoBridge.import_ckpt` follows.",
    changes=["Nothing yet: `config-check` reads the tables."],
    unchanged=["No existing file changes."],
    tested=["Each key of a family is in one column."],
    tests={"tests/unit/bridge/test_config_keys.py": "models/test_config_keys.py"},
)
