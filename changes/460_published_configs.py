# SPDX-License-Identifier: Apache-2.0
"""The configs of published models as a test: none of them may be refused."""

from fork.change import Change


change = Change(
    name="published-configs",
    message="""\
test(ckpt): import the configs of published models

A check that refuses what it doesn't know has to know what is published.

Keep the keys of 46 models' config.json as their authors spell them, from
Llama 2 to GLM-4.5, and take each of them through the check.
""",
    why="No published config is refused.",
    problem=(
        "Nothing shows that `AutoBridge.import_ckpt` accepts the config.json of published models, now that it checks "
        "every key."
    ),
    changes=["Nothing but tests."],
    unchanged=["The package."],
    tested=["The test itself."],
    tests={
        "tests/unit/bridge/published_configs.py": "models/published_configs.py",
        "tests/unit/bridge/test_published_configs.py": "models/test_published_configs.py",
        "tests/unit/bridge/test_config_values.py": "models/test_config_values.py",
    },
    stands_on=["config-check"],
)
