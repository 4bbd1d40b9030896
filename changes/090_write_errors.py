# SPDX-License-Identifier: Apache-2.0
"""A save that fails says what the system said, in one line."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, wrap


change = Change(
    name="write-errors",
    message="""\
fix(ckpt): say why a checkpoint could not be written

On a full disk, `save_megatron_model` raised a CheckpointException, which is
not an Exception, with the tracebacks of all ranks.

Raise an OSError with the system's message and the next step.
""",
    why="A save that fails on a full disk says so in one line.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                wrap(
                    "AutoBridge.save_megatron_model",
                    m.Expr(value=m.Call(func=m.Name("save_megatron_model"))),
                    "from megatron.bridge.training.write_errors import told_in_one_line\n"
                    "\n"
                    "with told_in_one_line(path):\n    {}",
                ),
            ],
        )
    ],
    modules=["training/write_errors.py"],
    stands_on=["release-checkpoints"],
    problem=(
        "On a full disk, `AutoBridge.import_ckpt` ends with a `CheckpointException`. `except Exception` doesn't "
        "catch it, and its text is the tracebacks of all ranks."
    ),
    changes=[
        "If a file can't be written, `AutoBridge.save_megatron_model` and `import_ckpt` raise an `OSError` of "
        "one line.",
    ],
    unchanged=["What `save_checkpoint` raises in a training."],
    tested=[
        "Imports to a full file system, and with a limit on the file size.",
    ],
    tests={"tests/unit/bridge/test_write_errors.py": "training/"},
)
