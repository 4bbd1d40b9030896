# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge repair`."""

from fork.change import Change


change = Change(
    name="command-repair",
    message="""\
feat(ckpt): add the command megatron-bridge repair

It turns the checkpoints of earlier versions of import_ckpt into release
checkpoints, also if somebody has partly fixed them by hand. No weight is
read or copied.
""",
    why="The command megatron-bridge repairs checkpoints.",
    modules=["cli/repair.py", "cli/terminal.py"],
    problem=(
        "Megatron-LM can't fine-tune from a checkpoint that `import_ckpt` of Megatron-Bridge 0.6 or earlier wrote. "
        "Fixing the tracker by hand only leads to the next error. `megatron-bridge repair OUT` fixes everything in "
        "place, within seconds."
    ),
    changes=[
        "`megatron-bridge repair` turns a checkpoint of an earlier `import_ckpt` into a release checkpoint.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=[
        "Checkpoints in every state that people have on disk, with each repair killed at each change of a file.",
    ],
    tests={"tests/unit/bridge/test_command_repair.py": "cli/"},
    stands_on=["command-inspect"],
)
