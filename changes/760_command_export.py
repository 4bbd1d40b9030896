# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge export`."""

from fork.change import Change


change = Change(
    name="command-export",
    message="""\
feat(ckpt): add the command megatron-bridge export

It runs AutoBridge.export_ckpt into a folder that appears when the export is
complete.
""",
    why="The command megatron-bridge exports checkpoints to Hugging Face.",
    modules=["cli/export.py"],
    problem=(
        "An export needs a script around `AutoBridge.export_ckpt` that names the imported model. If the script is "
        "killed, half a model is left."
    ),
    changes=[
        "`megatron-bridge export` runs `AutoBridge.export_ckpt`. It takes the imported model from run_config.yaml.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=[
        "An export that fails or is killed leaves nothing. An export to a folder with files is refused.",
    ],
    tests={"tests/unit/bridge/test_command_export.py": "cli/"},
    stands_on=["command-import", "export-model-files", "doubts"],
)
