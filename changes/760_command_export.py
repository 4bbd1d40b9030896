# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge export`."""

from fork.change import Change


change = Change(
    name="command-export",
    message="""\
feat(ckpt): add the command megatron-bridge export

It is AutoBridge.export_ckpt into a folder that appears when it is complete.
""",
    why="The command megatron-bridge exports checkpoints to Hugging Face.",
    modules=["cli/export.py"],
    problem="""\
An export takes a script around `AutoBridge.export_ckpt`, which has to know the model that was imported, and which leaves
half a model if it is killed.
""",
    changes=[
        "`megatron-bridge export` is `AutoBridge.export_ckpt`; the model that was imported is in run_config.yaml."
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=["An export that fails or is killed leaves nothing, and one over a folder that exists is refused."],
    tests={"tests/unit/bridge/test_command_export.py": "cli/"},
    stands_on=["command-import", "export-model-files", "doubts"],
)
