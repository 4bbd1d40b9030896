# SPDX-License-Identifier: Apache-2.0
"""What args say of a model's function, each in one form, and the keys of config.json that say the same."""

from fork.change import Change


change = Change(
    name="trained-keys",
    message="""\
feat(ckpt): compare args by what they say of a model's function

Megatron-LM's args describe one model in several ways.

Give each fact one form, and name the key of config.json that states it.
Take the number of rows of the vocabulary and the precision from the stored
weights.
""",
    why="Args of any version of Megatron-LM are compared with a model of Bridge's.",
    modules=[
        "release_checkpoint/architecture.py",
        "models/conversion/trained_keys.py",
        "models/conversion/trained_weights.py",
    ],
    limit=600,
    limit_reason="The tables of args and of keys are data.",
    problem=(
        "A checkpoint that Megatron-LM trained has its settings in its args, but `AutoBridge.export_ckpt` writes the "
        "config of the model that was imported. To compare the two, one form for both is needed: Megatron-LM's flags "
        "say the same thing in several ways, and differ between versions."
    ),
    changes=[
        "Nothing yet. `trained-config` uses the new modules.",
    ],
    unchanged=[
        "No existing file changes.",
    ],
    tested=[
        "Megatron-LM's own parser makes args of the flags of every family. They describe the same model as the "
        "args of the release checkpoint.",
    ],
    later=[
        "`trained-config` writes the config of an export by these facts.",
    ],
    stands_on=["launch-flags", "hf-checkpoint", "config-check", "payload-facts"],
    tests={"tests/unit/bridge/release_checkpoint/test_architecture.py": "release_checkpoint/"},
)
