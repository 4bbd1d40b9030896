# SPDX-License-Identifier: Apache-2.0
"""Laying the stack over a folder: where it goes, what it says it touched, and what it refuses before it writes."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fork import stack
from fork.__main__ import main
from fork.change import Change
from fork.edits import File, add_parameter, call
from fork.edits import replace as replace_node
from fork.errors import EditError, ForkError


PATCH = """
from fork.change import Change

change = Change(name="{name}", message="", why="")
"""


@pytest.fixture(params=["", "src"], ids=["wheel", "checkout"])
def root(request: pytest.FixtureRequest, tmp_path: Path, upstream_files: dict[str, str]) -> Path:
    """The made-up upstream as a folder."""
    root = tmp_path / "root"
    for name, text in upstream_files.items():
        path = root / request.param / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_apply_edits_files_and_adds_modules(root: Path, change: Change, modules: Path):
    before = contents(root)
    touched = stack.apply([change], root, modules, pristine=True)
    assert touched == {"saving.py": ["example"], "new/extra.py": ["example"]}
    package = stack.find_package(root)
    assert (package / "saving.py").read_text() == "def save(path, release: bool = False):\n    return path\n"
    assert (package / "new" / "extra.py").read_text() == "ANSWER = 42\n"
    after = contents(root)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in changed} == {"saving.py", "extra.py"}


def test_second_application_changes_nothing(root: Path, change: Change, modules: Path):
    stack.apply([change], root, modules)
    once = contents(root)
    stack.apply([change], root, modules)
    assert contents(root) == once


def test_changes_stand_on_those_before_them(root: Path, change: Change, modules: Path):
    later = Change("later", "", "", [File("saving.py", [add_parameter("save", "more: int = 0")])])
    touched = stack.apply([change, later], root, modules)
    assert touched["saving.py"] == ["example", "later"]
    text = (stack.find_package(root) / "saving.py").read_text()
    assert "def save(path, release: bool = False, more: int = 0):" in text


def test_file_that_no_edit_of_this_release_touches_is_not_named(root: Path, modules: Path):
    edit = add_parameter("save", "new: int = 0", releases=">=2")
    assert stack.apply([Change("later", "", "", [File("saving.py", [edit])])], root, modules) == {}


def test_failing_edit_leaves_everything_as_it_was(root: Path, change: Change, modules: Path):
    before = contents(root)
    bad = Change("bad", "", "", [File("saving.py", [replace_node("save", call("torch.save"), "x")])])
    with pytest.raises(EditError) as error:
        stack.apply([change, bad], root, modules)
    assert str(error.value) == (
        "change bad: saving.py: replace call of torch.save in save: expected 1 place, found 0; "
        "look at megatron-bridge 1.2.3 and adjust the edit in changes/"
    )
    assert contents(root) == before


def test_missing_file_is_refused(root: Path, modules: Path):
    with pytest.raises(EditError, match=r"change c: expected the file gone.py in upstream, found none"):
        stack.apply([Change("c", "", "", [File("gone.py", [])])], root, modules)


def test_missing_module_is_refused(root: Path, change: Change, modules: Path):
    with pytest.raises(ForkError, match=r"change example: .*other.py does not exist; add it"):
        stack.apply([replace(change, modules=["other.py"])], root, modules)


def test_module_that_upstream_has_too_is_refused(root: Path, change: Change, modules: Path):
    (modules / "saving.py").write_text("")
    with pytest.raises(ForkError, match=r"change example: upstream has a module saving.py at this path"):
        stack.apply([replace(change, modules=["saving.py"])], root, modules, pristine=True)


def test_folder_that_is_not_upstream_is_refused(tmp_path: Path, change: Change):
    with pytest.raises(ForkError, match="holds no megatron/bridge; expected an unpacked wheel or a checkout"):
        stack.apply([change], tmp_path)


def test_scripts_are_added_once(root: Path):
    scripted = Change("c", "", "", scripts={"bridge": "megatron.bridge.cli:main"})
    points = next(root.rglob("entry_points.txt"))
    before = points.read_text()
    checkout = root / "pyproject.toml"
    if "src" in str(points):
        checkout.write_text(
            '[project]\n[tool.setuptools.packages.find]\ninclude = ["megatron.bridge", "megatron.bridge.*"]\n'
        )
    for _ in range(2):
        stack.apply([scripted], root)
        if checkout.exists():
            parsed = tomllib.loads(checkout.read_text())
            assert parsed["project"]["scripts"] == {"bridge": "megatron.bridge.cli:main"}
            packages = parsed["tool"]["setuptools"]["packages"]["find"]["include"]
            assert packages == ["megatron.bridge", "megatron.bridge.*"]
        else:
            assert points.read_text() == before + "\n[console_scripts]\nbridge = megatron.bridge.cli:main\n"
    other = replace(scripted, scripts={"bridge": "megatron.bridge.cli.other:main"})
    with pytest.raises(ForkError, match="has a section .*scripts] already|expected no script bridge, found megatron"):
        stack.apply([other], root)


def test_load_goes_by_the_numbers(tmp_path: Path):
    for file, name in [("10_last", "last"), ("02_first", "first"), ("helper", "helper")]:
        (tmp_path / f"{file}.py").write_text(PATCH.format(name=name))
    assert [change.name for change in stack.load(tmp_path)] == ["first", "last"]
    assert [change.name for change in stack.load(tmp_path, ["last"])] == ["last"]
    with pytest.raises(ForkError, match="no change other in the stack; expected one of: first, last"):
        stack.load(tmp_path, ["other"])


def test_every_change_of_the_stack_says_what_a_commit_needs():
    for change in stack.load():
        subject, blank, body = change.message.partition("\n\n")
        assert ": " in subject, change.name
        assert len(subject) <= 72, change.name
        assert blank, change.name
        assert body.strip(), change.name
        assert change.why.strip(), change.name
        for module in change.modules:
            assert (stack.MODULES / module).is_file(), module


def test_every_new_module_belongs_to_one_change():
    owned = [module for change in stack.load() for module in change.modules]
    there = [os.path.relpath(path, stack.MODULES) for path in stack.MODULES.parent.rglob("*.py")]
    assert sorted(owned) == sorted(there)


def test_command_line_tells_errors_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, ["apply", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path} holds no megatron/bridge")
    assert result.output.count("\n") == 1
