# SPDX-License-Identifier: Apache-2.0
"""Which payload a repair makes the release, and its steps in the file system."""

from fork.change import Change


change = Change(
    name="repair-choice",
    message="""\
feat(ckpt): choose the payload that a repair makes the release

Refuse trainings, choose between an old and a new folder, and change files
so that a crash leaves each whole.
""",
    why="A repair touches no training.",
    modules=["repair/__init__.py", "repair/steps.py", "repair/choice.py"],
    stands_on=["examine", "release-writer"],
    problem=(
        "People move `iter_0000000` to `release` by hand and forget half of it. Nothing tells which of the folders "
        "is complete."
    ),
    changes=["Two new modules below `megatron.bridge.release_checkpoint`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests on roots with one payload, two, and a training."],
    later=["The next changes are the common state and the plan."],
    tests={"tests/unit/bridge/release_checkpoint/test_repair_choice.py": "release_checkpoint/"},
)
