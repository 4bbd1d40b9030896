# SPDX-License-Identifier: Apache-2.0
"""What an import used to write becomes a release checkpoint."""

from contextlib import suppress
from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.repair import repair
from megatron.bridge.repair import state as repair_state
from megatron.bridge.repair import steps as repair_steps


BEFORE = {"folder": "iter_0000000", "tracker": "0", "args": None, "train_state": True, "bridge_tracker": True}
STEPS = [
    "write Megatron-LM's args",
    "write common.pt into the entry common_state",
    "remove latest_train_state.pt (Bridge's tracker of a training)",
    "remove latest_checkpointed_iteration.txt (it names iter_0000000",
    "rename iter_0000000 to release",
    "remove release/train_state.pt (a release has no training state)",
    "write release into the tracker",
]


@pytest.fixture(autouse=True)
def derived(monkeypatch, release_args):
    monkeypatch.setattr(repair_state, "_derive_args", lambda payload, hf_model, trust: release_args)


def is_release(root: Path) -> None:
    found = examine(root)
    assert (found.layout, found.leftovers, found.folders) == ("release", [], ["release"])
    assert (found.payload.missing_args, found.payload.discord, found.payload.damage) == ([], [], [])
    assert repair.plan(root).steps == ()


def test_an_import_of_before_becomes_a_release(build, tmp_path: Path):
    root = build(tmp_path / "c", **BEFORE)
    plan = repair.plan(root)
    assert [step.what.partition(",")[0] for step in plan.steps] == STEPS
    repair.run(plan)
    is_release(root)


def test_a_repair_that_stops_at_any_change_is_completed_by_the_next(build, tmp_path: Path, monkeypatch):
    for number in range(1, 100):
        root = build(tmp_path / str(number), **BEFORE)
        changes = iter(range(1, 100))

        def act(function, *arguments):
            if next(changes) == number:  # noqa: B023 - called in this turn
                raise OSError("stopped")
            function(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(repair_steps, "act", act)
            with suppress(OSError):
                repair.run(repair.plan(root))
        repair.run(repair.plan(root))
        is_release(root)
        if next(changes) <= number:
            break
    assert number > len(STEPS)


def test_a_training_is_not_repaired(build, tmp_path: Path):
    root = build(tmp_path / "c", "iter_0000005", "5", iteration=5, optimizer=True)
    assert repair.foresee(examine(root)) is None
    with pytest.raises(repair.Refused, match="holds training iteration 5"):
        repair.plan(root)
