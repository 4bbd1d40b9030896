# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`, whose one subcommand completes the others."""

from fork.change import LOCK, Change
from fork.requirements import add


change = Change(
    name="command",
    message="""\
feat(ckpt): add the command megatron-bridge

It finds its subcommands among its modules, and reports an error in one line:
what was found, what was expected, and what to do. `completion` prints a
script for the shell. The other subcommands follow.
""",
    why="The command megatron-bridge reports errors in one line.",
    modules=["cli/__init__.py", "cli/command.py", "cli/completion.py", "cli/text.py"],
    requirements=[add("click")],
    scripts={"megatron-bridge": "megatron.bridge.cli:main"},
    problem=(
        "Bridge has no command. A conversion needs a script around AutoBridge, whose errors are tracebacks of forty "
        "lines. This change adds `megatron-bridge` without the subcommands `inspect`, `repair`, `import`, and "
        "`export`, which follow one by one."
    ),
    changes=[
        "There is a command `megatron-bridge`.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=[
        "Errors of the operating system and of Bridge are one line each. `--verbose` shows the traceback.",
    ],
    notes=[
        LOCK,
        "`click` is no new package in an installation: wandb, which Megatron Bridge requires, requires it, and so does "
        "huggingface_hub.",
    ],
    tests={"tests/unit/bridge/test_command.py": "cli/"},
    limit=500,
    limit_reason="One test shows all that the frame of the command promises.",
    stands_on=["resolver", "lazy-package", "processes"],
)
