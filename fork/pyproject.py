# SPDX-License-Identifier: Apache-2.0
"""What the changes do to a checkout's pyproject.toml: requirements and console scripts, nothing else."""

import re
from collections.abc import Mapping, Sequence

import tomlkit
from packaging.requirements import Requirement
from tomlkit.items import Array, Table

from fork import requirements
from fork.change import Change
from fork.errors import EditError


EXTRA = re.compile(r'^(?P<before>.*?)(?: and )?\bextra == "(?P<extra>[^"]+)"$')


def edit(text: str, changes: Sequence[Change], release: str) -> str:
    """Returns the text of a pyproject.toml with the requirements and console scripts of `changes`.

    Raises:
        EditError: a requirement is missing, or a script of that name is another.
    """
    document = tomlkit.parse(text)
    _edit_requirements(document["project"], [edit for change in changes for edit in change.requirements], release)
    for change in changes:
        _add_scripts(document["project"], change.scripts)
    return tomlkit.dumps(document)


def _edit_requirements(project: Table, edits: Sequence[requirements.RequirementEdit], release: str) -> None:
    lists = {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
    before = {_in_extra(each, extra): (extra, each) for extra, array in lists.items() for each in array}
    after = requirements.edit(list(before), edits, release)
    comments = {}
    for each in before.keys() - set(after):
        extra, text = before[each]
        comments[Requirement(each).name] = _comment(lists[extra], text)
        lists[extra].remove(text)
    for each in after:
        if each not in before:
            _add(project, lists, each, comments.get(Requirement(each).name, ""))


def _comment(array: Array, text: str) -> str:
    """The comment on the line of `text`, one of the array's strings; empty if there is none."""
    found = re.search(rf"""(["']){re.escape(text)}\1[ ,]*#\s*(.*)""", array.as_string())
    return found[2] if found else ""


def _add_scripts(project: Table, scripts: Mapping[str, str]) -> None:
    if not scripts:
        return
    table = project.get("scripts", tomlkit.table())
    for name, script in scripts.items():
        if table.get(name, script) != script:
            raise EditError(f"pyproject.toml: expected no script {name}, found {table[name]}")
        table[name] = script
    if "scripts" not in project:
        project["scripts"] = table.add(tomlkit.nl())


def _in_extra(requirement: str, extra: str) -> str:
    """The requirement as a wheel's metadata has it."""
    parsed = Requirement(requirement)
    return str(requirements.into(parsed, extra) if extra else parsed)


def _add(project: Table, lists: dict[str, Array], requirement: str, comment: str) -> None:
    """Adds a requirement of a wheel's metadata to the list of its extra, made if need be."""
    spec, _, marker = requirement.partition("; ")
    found = EXTRA.match(marker)
    extra, rest = (found["extra"], found["before"]) if found else ("", marker)
    if "extra" in rest:
        raise EditError(f"pyproject.toml: expected a requirement of one extra, found {requirement}")
    rest = rest.removeprefix("(").removesuffix(")") if found else rest
    if extra and extra not in lists:
        extras = project.setdefault("optional-dependencies", tomlkit.table())
        extras[extra] = tomlkit.array().multiline(True)
        lists[extra] = extras[extra]
    # TOML takes a text in double quotes without escapes only if it has none itself.
    text = f"{spec}; {rest}".replace('"', "'") if rest else spec
    if comment:
        lists[extra].add_line(text, comment=comment)
    else:
        lists[extra].append(text)
