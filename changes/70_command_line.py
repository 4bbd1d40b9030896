# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`: import, inspect, repair, export."""

from fork.change import LOCK, Change
from fork.requirements import add


change = Change(
    name="command-line",
    message="""feat(ckpt): add the command megatron-bridge

import and export are import_ckpt and export_ckpt. inspect says what is at a
path, and which Megatron-LM loads it; it reads metadata without torch, and
no pickle of a checkpoint runs. repair turns what import_ckpt used to write,
and what people have half mended by hand, into a release checkpoint.
""",
    why="The command megatron-bridge imports, exports, inspects and repairs checkpoints.",
    modules=[
        "cli/__init__.py",
        "cli/command.py",
        "cli/export.py",
        "cli/import_.py",
        "cli/inspect.py",
        "cli/deferred.py",
        "cli/repair.py",
        "cli/show.py",
        "cli/terminal.py",
    ],
    requirements=[add("click"), add("rich")],
    scripts={"megatron-bridge": "megatron.bridge.cli:main"},
    changes=[
        "`megatron-bridge import` and `export` are `import_ckpt` and `export_ckpt`.",
        "`megatron-bridge inspect` says what is at a path and what Megatron-LM does with it, without running a pickle.",
        "`megatron-bridge repair` makes a release checkpoint of what `import_ckpt` wrote before.",
    ],
    tested=["Checkpoints in every state that people have on disk, in the unit tests."],
    notes=[
        LOCK,
        "`click` is no new package in an installation: wandb, which Megatron Bridge requires, requires it, and so does "
        "huggingface_hub.",
    ],
    tests={
        "tests/unit/bridge/test_deferred.py": "cli/",
    },
    stands_on=["problems", "lazy-package"],
)
