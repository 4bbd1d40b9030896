# SPDX-License-Identifier: Apache-2.0
"""Common states are compared, whatever a pickle holds."""

from typing import Any

import pytest

from megatron.bridge.release_checkpoint.metadata import read_metadata
from megatron.bridge.release_checkpoint.state import differences, is_plain, plain_args, read_forms


FORMS_AT_0 = {"common.pt": 0, "entry": 0}
CYCLE: list = []
CYCLE.append(CYCLE)
DEEP: tuple = ()
for _ in range(100_000):
    DEEP = (DEEP,)
DOUBLED: list = []
for _ in range(100):
    DOUBLED = [DOUBLED, DOUBLED]


@pytest.mark.parametrize("value", [CYCLE, DEEP, DOUBLED], ids=["cycle", "deep", "doubled"])
def test_common_states_without_end_are_compared(value: Any):
    assert differences({"a": value}, {"a": value, "b": 1}) == ["b"]
    assert is_plain({"a": value})


@pytest.mark.parametrize(("one", "other"), [(0, False), (1, 1.0), ([1], (1,)), ({1: 2}, {1: 3}), ("a", b"a")])
def test_values_of_another_type_differ(one: Any, other: Any):
    assert differences({"a": one}, {"a": other}) == ["a"]
    assert differences({"a": [one, float("nan")]}, {"a": [one, float("nan")]}) == []


def test_what_one_form_has_lost_the_other_has(build, tmp_path):
    folder = build(tmp_path / "c") / "release"
    metadata, damage = read_metadata(folder / ".metadata"), []
    assert {name: form.state["iteration"] for name, form in read_forms(folder, metadata, damage).items()} == FORMS_AT_0
    (folder / "common.pt").write_bytes(b"nonsense")
    forms = read_forms(folder, metadata, damage)
    assert "is not what torch.save writes" in forms["common.pt"].damage and forms["entry"].state and not damage
    (folder / "__0_0.distcp").unlink()
    read_forms(folder, metadata, damage)
    assert len(damage) == 2


def test_args_are_plain():
    assert plain_args({"args": {"num_layers": 2}}) is None
    assert plain_args(None) is None
