# SPDX-License-Identifier: Apache-2.0
"""Edits of requirements, and the names of the extras that come of them."""

import pytest

from fork import requirements
from fork.errors import EditError


def test_move_puts_a_requirement_and_its_marker_into_the_extra():
    asked = ["torch", 'For_GPUs>=1; sys_platform != "darwin"', "other"]
    edited = requirements.edit(asked, [requirements.move("for-gpus", "cuda")], "1.0")
    assert edited == ["torch", 'For_GPUs>=1; sys_platform != "darwin" and extra == "cuda"', "other"]
    assert requirements.extras(edited) == ["cuda"]


def test_move_leaves_what_another_extra_asks_for():
    asked = ["x", 'x; extra == "audio"']
    edited = requirements.edit(asked, [requirements.move("x", "cuda")], "1.0")
    assert edited == ['x; extra == "cuda"', 'x; extra == "audio"']


def test_replace_puts_several_in_place_of_one():
    edited = requirements.edit(["a", "core[dev]"], [requirements.replace("core", "core>=1", "b")], "1.0")
    assert edited == ["a", "core>=1", "b"]


@pytest.mark.parametrize("edit", [requirements.move("x", "cuda"), requirements.replace("x", "y")])
def test_missing_requirement_is_refused(edit: requirements.RequirementEdit):
    with pytest.raises(EditError, match=f"{edit.name}: expected a requirement of x, found none"):
        requirements.edit(["a"], [edit], "1.0")


def test_edits_apply_to_the_releases_that_they_cover():
    edit = requirements.replace("x", "y", releases="<1")
    assert requirements.edit(["x"], [edit], "1.0") == ["x"]
    assert requirements.edit(["x"], [edit], "0.9") == ["y"]


def test_add_keeps_what_is_there():
    added = [requirements.add("x"), requirements.add("y")]
    assert requirements.edit(["x>=2", 'y; extra == "audio"'], added, "1.0") == ["x>=2", 'y; extra == "audio"', "y"]
