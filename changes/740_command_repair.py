# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge repair`."""

from fork.change import Change


change = Change(
    name="command-repair",
    message="""\
feat(ckpt): add the command megatron-bridge repair

It turns what import_ckpt used to write, and what somebody has partly fixed
by hand, into a release checkpoint. No weight is read or copied.
""",
    why="The command megatron-bridge repairs checkpoints.",
    modules=["cli/repair.py", "cli/terminal.py"],
    problem="""\
What `import_ckpt` of Megatron-Bridge 0.6 and earlier wrote, Megatron-LM can't fine-tune from. Fixing the tracker by hand
turns one error into the next. `megatron-bridge repair OUT` fixes all of it in place, in seconds.
""",
    changes=["`megatron-bridge repair` makes a release checkpoint of what `import_ckpt` wrote before."],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=["Checkpoints in every state that people have on disk, each repair killed at each change of a file."],
    tests={"tests/unit/bridge/test_command_repair.py": "cli/"},
    stands_on=["command-inspect"],
)
