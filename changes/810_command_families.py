# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge families`, and the nearest names for an architecture without a bridge."""

from fork.change import Change
from fork.edits import File, add_import, expression, replace


change = Change(
    name="command-families",
    message="""\
feat(ckpt): add the command megatron-bridge families

It lists the architectures that can be converted, with the result for each,
before anybody downloads a model. The error for another architecture names the
nearest ones.
""",
    why="What can be converted is known before a download.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import family_results"),
                replace(
                    "AutoBridge._validate_config",
                    expression("len(supported_models)"),
                    "family_results.counted(supported_models, architecture)",
                ),
            ],
        )
    ],
    modules=["cli/families.py"],
    problem="Which models can be converted, and how well, is only known after a download and a try.",
    changes=[
        "`megatron-bridge families` prints a line for each architecture.",
        "The error for an architecture without a bridge has the nearest names.",
    ],
    unchanged=["`AutoBridge.list_supported_models()`."],
    tested=["Every architecture that Bridge registers has a line."],
    tests={"tests/unit/bridge/test_command_families.py": "cli/"},
    stands_on=["command", "layout-families"],
)
