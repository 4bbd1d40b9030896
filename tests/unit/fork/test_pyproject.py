# SPDX-License-Identifier: Apache-2.0
"""A checkout's pyproject.toml: requirements that move and change, console scripts, and everything else as it was."""

import difflib
import re
import tomllib

import pytest

from fork import pyproject
from fork.change import Change
from fork.errors import EditError
from fork.requirements import add, move, replace


TEXT = """\
# A comment.
[project]
name = "upstream"   # another
dependencies = [
    "torch >= 2",  # as it is written
    "core[dev,mlm]",
    "for-gpus==1.0; sys_platform != 'darwin'",
    "a==1",  # in step
    "b==1",   # with a
]

[project.optional-dependencies]
audio = ["librosa"]

[tool.setuptools.packages.find]
include = ["megatron.bridge", "megatron.bridge.*"]
"""


def edit(*requirements, text: str = TEXT, **scripts: str) -> str:
    change = Change("c", "", "", requirements=requirements, scripts=scripts)
    return pyproject.edit(text, [change], "1.0")


def test_requirement_moves_to_an_extra_with_its_marker():
    parsed = tomllib.loads(edit(move("for-gpus", "cuda")))["project"]
    assert parsed["dependencies"] == ["torch >= 2", "core[dev,mlm]", "a==1", "b==1"]
    assert parsed["optional-dependencies"]["audio"] == ["librosa"]
    assert parsed["optional-dependencies"]["cuda"] == ["for-gpus==1.0; sys_platform != 'darwin'"]


def test_requirement_is_replaced_by_several():
    text = edit(replace("core", "core[mlm]", 'core[dev]; extra == "audio"', 'other>=1; python_version > "3"'))
    parsed = tomllib.loads(text)["project"]
    assert parsed["optional-dependencies"]["audio"] == ["librosa", "core[dev]"]
    assert set(parsed["dependencies"][4:]) == {"core[mlm]", "other>=1; python_version > '3'"}


def test_comments_move_with_their_requirements():
    extras = edit(move("a", "cuda"), move("b", "cuda")).partition("[project.optional-dependencies]")[2]
    assert re.sub(" +", " ", extras.partition("cuda = ")[2].partition("]")[0]) == (
        '[\n "a==1", # in step\n "b==1", # with a\n'
    )


def test_script_is_parted_from_what_follows():
    text = edit(bridge="megatron.bridge.cli:main")
    assert '\n[project.scripts]\nbridge = "megatron.bridge.cli:main"\n\n[' in text


def test_what_is_not_edited_stays_as_it_is_written():
    lines = difflib.ndiff(TEXT.splitlines(), edit(move("for-gpus", "cuda")).splitlines())
    assert [line[2:].strip() for line in lines if line.startswith("- ")] == [
        "\"for-gpus==1.0; sys_platform != 'darwin'\","
    ]
    assert edit() == TEXT


def test_second_edit_changes_nothing():
    edits = [move("for-gpus", "cuda"), replace("core", "core[mlm]", 'core[dev]; extra == "cuda"'), add("click")]
    once = edit(*edits, bridge="megatron.bridge.cli:main")
    assert edit(*edits, text=once, bridge="megatron.bridge.cli:main") == once
    assert tomllib.loads(once)["project"]["scripts"] == {"bridge": "megatron.bridge.cli:main"}


def test_checkout_without_extras_gets_its_first():
    text = '[project]\ndependencies = ["x"]\n'
    assert tomllib.loads(edit(move("x", "cuda"), text=text))["project"]["optional-dependencies"] == {"cuda": ["x"]}


def test_missing_requirement_is_refused():
    with pytest.raises(EditError, match="requirements: move gone to the extra cuda: expected a requirement of gone"):
        edit(move("gone", "cuda"))
