# SPDX-License-Identifier: Apache-2.0
"""What args say of a model's function, each in one form, and the keys of config.json that say the same."""

from fork.change import Change


change = Change(
    name="trained-keys",
    message="""\
feat(ckpt): compare args by what they say of a model's function

Megatron-LM's args spell one model in several ways. Give each fact one form,
and name the key of config.json that says it. The rows of the vocabulary and
the precision are those of the stored weights.
""",
    why="Args of any version of Megatron-LM are compared with a model of Bridge's.",
    modules=[
        "release_checkpoint/architecture.py",
        "models/conversion/trained_keys.py",
        "models/conversion/trained_weights.py",
    ],
    limit=600,
    limit_reason="The tables of args and of keys are data.",
    problem="What was trained is in the args of a checkpoint, and nothing compares them with the config of an export.",
    changes=["Three new modules, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Megatron-LM's own parser makes args of the flags of every family: they say the same as the release's."],
    later=["The next change exports by them."],
    stands_on=["launch-flags", "hf-checkpoint", "config-check", "payload-facts"],
    tests={"tests/unit/bridge/release_checkpoint/test_architecture.py": "release_checkpoint/"},
)
