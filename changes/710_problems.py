# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, and whether a repair can change it."""

from fork.change import Change


change = Change(
    name="problems",
    message="""\
feat(ckpt): list what is wrong with a checkpoint

Name what is damaged, missing, or left over, one thing a line, and whether a
repair can change it.
""",
    why="What is wrong with a checkpoint is listed, one thing a line.",
    modules=["repair/problems.py"],
    stands_on=["repair", "verdicts"],
    problem="Errors such as `KeyError: 'optimizer'` do not say what is wrong with a checkpoint.",
    changes=["A new module, `megatron.bridge.repair.problems`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests on checkpoints in some 70 states that people have on disk."],
    later=["The subcommands `inspect` and `repair` stand on this."],
    tests={
        "tests/unit/bridge/release_checkpoint/test_problems.py": "release_checkpoint/",
        "tests/unit/bridge/test_other_formats.py": "release_checkpoint/",
    },
)
