# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`: import, inspect, repair, export.

Upstream status: not proposed yet.
"""

from fork.edits import Change
from fork.requirements import add


change = Change(
    name="command-line",
    message="""feat(ckpt): add the command megatron-bridge

import and export are import_ckpt and export_ckpt. inspect says what is at a
path, and which Megatron-LM loads it; it reads metadata without torch, and
no pickle of a checkpoint runs. repair turns what import_ckpt used to write,
and what people have half mended by hand, into a release checkpoint.

The package lies beside megatron.bridge: importing anything below that takes
ten seconds, and inspect takes less than one.
""",
    why="The command megatron-bridge imports, exports, inspects and repairs checkpoints.",
    modules=[
        "../bridge_cli/checkpoint.py",
        "../bridge_cli/lean_import.py",
        "../bridge_cli/main.py",
        "../bridge_cli/repair.py",
        "../bridge_cli/verdicts.py",
    ],
    requirements=[add("click"), add("rich")],
    scripts={"megatron-bridge": "megatron.bridge_cli.main:main"},
)
