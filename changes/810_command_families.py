# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge families`, and the nearest names for an architecture without a bridge."""

from fork.change import Change
from fork.edits import File, add_import, expression, replace


change = Change(
    name="command-families",
    message="""\
feat(ckpt): add the command megatron-bridge families

Users learn only after a download whether a model can be converted.

`megatron-bridge families` lists the architectures that can be converted,
with the result for each. The error for any other architecture names the
closest ones.
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
    problem=(
        "Users learn only from `AutoBridge.import_ckpt(hf_model, out)`, after a download of many gigabytes, whether "
        "a model can be converted on their host. The error for an unknown architecture doesn't say which known one "
        "is close to it."
    ),
    changes=[
        "`megatron-bridge families` prints one line for each architecture.",
        "The error for an architecture without a bridge names the closest architectures.",
    ],
    unchanged=[
        "`AutoBridge.list_supported_models()`.",
    ],
    tested=[
        "A unit test: every architecture that Bridge registers has a line.",
    ],
    tests={"tests/unit/bridge/test_command_families.py": "cli/"},
    stands_on=["command", "layout-families"],
)
