# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge inspect`."""

from fork.change import LOCK, Change
from fork.requirements import add


change = Change(
    name="command-inspect",
    message="""\
feat(ckpt): add the command megatron-bridge inspect

It shows what lies at a path, which versions of Megatron-LM load it, and with
which flags. It reads metadata without torch, and runs no pickle of a
checkpoint.
""",
    why="The command megatron-bridge inspects checkpoints.",
    modules=["cli/inspect.py", "cli/show.py"],
    requirements=[add("rich")],
    problem=(
        "Whether `pretrain_gpt.py --load out` can train from a checkpoint, and with which flags, shows minutes after "
        "its start, often as a `KeyError`. `megatron-bridge inspect OUT` shows it within a second, from metadata "
        "alone."
    ),
    changes=[
        "`megatron-bridge inspect` shows what is at a path and which versions of Megatron-LM load it. It runs no "
        "pickle.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=[
        "Checkpoints in every state that people have on disk, in the unit tests of the project that proposes "
        "this change.",
    ],
    later=[
        "The subcommands `repair`, `import`, and `export`.",
    ],
    notes=[LOCK, "`rich` is imported by Bridge already; it is now named."],
    tests={"tests/unit/bridge/test_command_inspect.py": "cli/"},
    stands_on=["command", "problems", "doubts"],
)
