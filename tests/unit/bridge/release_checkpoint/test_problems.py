# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint is said, and whether a repair can change it."""

from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.files import HOST
from megatron.bridge.repair.problems import problems


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, []),
        ({"folder": "iter_0000005", "tracker": "5", "iteration": 5, "optimizer": True}, []),
        ({"tracker": None}, ["No tracker: starts from random weights"]),
        ({"common_pt": False}, ["There is no common.pt: Megatron-LM up to core 0.18 looks for it"]),
        ({"args": None}, ["The common state has no Megatron-LM args"]),
        ({"without": "checkpoint_version"}, ["checkpoint_version is None, expected 3.0"]),
        (
            {"leftovers": (f"release.incomplete.{HOST}-1-01234567",)},
            [f"release.incomplete.{HOST}-1-01234567 was left by an import or a repair that was killed"],
        ),
    ],
)
def test_a_problem_is_a_line_that_a_repair_changes(made: dict, said: list[str], build, tmp_path: Path):
    found = problems(examine(build(tmp_path / "c", **made)))
    assert [each.what for each in found] == said
    assert all(each.repairable for each in found)


def test_damage_and_nothing_at_all_are_not_repairable(build, tmp_path: Path):
    root = build(tmp_path / "c")
    (root / "release/__0_0.distcp").unlink()
    assert [each.repairable for each in problems(examine(root))] == [False]
    (missing,) = problems(examine(tmp_path / "missing"))
    assert missing.what.startswith("There is nothing at this path") and not missing.repairable
