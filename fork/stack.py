# SPDX-License-Identifier: Apache-2.0
"""The stack of changes: loads changes/ in order and lays it over a folder that holds upstream."""

import ast
import importlib.util
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fork.change import Change
from fork.edits import Misplaced
from fork.errors import EditError, ForkError
from fork.formatting import tidy


REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = REPOSITORY / "src" / "megatron" / "bridge"


CHANGES = REPOSITORY / "changes"


def files(folder: Path = CHANGES) -> list[Path]:
    """Returns the file of each change, in the order of the stack."""
    return sorted(folder.glob("[0-9]*.py"))


def load(folder: Path = CHANGES, names: Iterable[str] = ()) -> list[Change]:
    """Returns the changes of the stack in order; with `names`, only those.

    Raises:
        ForkError: a name is not in the stack.
    """
    changes = []
    for path in files(folder):
        spec = importlib.util.spec_from_file_location(f"changes.{path.stem}", path)
        assert spec and spec.loader, "it is a Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        changes.append(module.change)
    return select(changes, names)


def select(changes: Sequence[Change], names: Iterable[str]) -> list[Change]:
    """Returns those of `changes` that `names` says, all if it says none.

    Raises:
        ForkError: a name is not among them.
    """
    wanted = set(names)
    unknown = wanted - {change.name for change in changes}
    if unknown:
        known = ", ".join(change.name for change in changes)
        raise ForkError(f"no change {', '.join(sorted(unknown))} in the stack; expected one of: {known}")
    return [change for change in changes if not wanted or change.name in wanted]


def find_package(root: Path) -> Path:
    """Returns the folder megatron/bridge of an unpacked wheel or a checkout of upstream at `root`.

    Raises:
        ForkError: there is none.
    """
    for package in (root / "megatron" / "bridge", root / "src" / "megatron" / "bridge"):
        if (package / "package_info.py").is_file():
            return package
    raise ForkError(f"{root} holds no megatron/bridge; expected an unpacked wheel or a checkout of Megatron-Bridge")


def read_release(package: Path) -> str:
    """Returns the version that upstream's package_info.py states, without importing it."""
    values = {}
    for node in ast.parse((package / "package_info.py").read_text("utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(value)):
                values[name] = str(value)
    return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values['PRE_RELEASE']}"


def apply(
    changes: Sequence[Change],
    root: Path,
    modules: Path = MODULES,
    *,
    pristine: bool = False,
    misplaced: list[Misplaced] | None = None,
) -> dict[str, list[str]]:
    """Lays `changes` over upstream at `root`, formatted; writes nothing unless every edit finds its place.

    The requirements in a wheel's metadata are the build's.

    Args:
        changes: the stack, in order.
        root: an unpacked wheel or a checkout of upstream.
        modules: the folder that the changes' new modules are in.
        pristine: upstream is as it was released: what an edit or a new module would add must not be there yet.
        misplaced: takes every edit that doesn't find its place, where otherwise the first of them is an error; nothing
            is written if there is one.

    Returns:
        The names of the changes that touch each file, edited or new, by its path relative to megatron/bridge.

    Raises:
        EditError: an edit's place is missing or ambiguous.
        ForkError: `root` is not upstream, or a new module is missing or would replace one of upstream's.
    """
    package = find_package(root)
    release = read_release(package)
    sources: dict[str, str] = {}
    touched: dict[str, list[str]] = {}
    for change in changes:
        for file in change.edits:
            if not file.covers(release):
                continue
            if file.path not in sources and not (package / file.path).is_file():
                message = f"change {change.name}: expected the file {file.path} in upstream, found none"
                if misplaced is None:
                    raise EditError(f"{message}; adjust the path in changes/")
                misplaced.append(Misplaced(message, file.path))
                continue
            before = sources[file.path] if file.path in sources else (package / file.path).read_text("utf-8")
            found: list[Misplaced] = []
            try:
                sources[file.path] = file.apply(
                    before, release, pristine=pristine, misplaced=None if misplaced is None else found
                )
            except EditError as error:
                remedy = f"look at megatron-bridge {release} and adjust the edit in changes/"
                raise EditError(f"change {change.name}: {error}; {remedy}") from None
            if misplaced is not None:
                misplaced += [replace(each, message=f"change {change.name}: {each.message}") for each in found]
            if sources[file.path] != before:
                touched.setdefault(file.path, []).append(change.name)
        for module in change.modules:
            _check_module(change, modules / module, package / module, pristine)
            touched.setdefault(module, []).append(change.name)
    if misplaced:
        return {}
    project = _edit_project(changes, root, release)
    for path in touched:
        if path in sources:
            (package / path).write_text(sources[path], "utf-8")
        else:
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(modules / path, package / path)
    for changed, text in project.items():
        changed.write_text(text, "utf-8")
    tidy(root, [package / path for path in touched if path in sources])
    return touched


def _edit_project(changes: Sequence[Change], root: Path, release: str) -> dict[Path, str]:
    """Returns the file that holds the console scripts, and in a checkout the requirements, with those of `changes`."""
    checkout = root / "pyproject.toml"
    if checkout.is_file():
        # Here and not above, for a build of the wheel does without its library.
        from fork import pyproject

        text = checkout.read_text("utf-8")
        edited = pyproject.edit(text, changes, release)
        return {checkout: edited} if edited != text else {}
    lines = [f"{name} = {script}" for change in changes for name, script in change.scripts.items()]
    points = [path.with_name("entry_points.txt") for path in root.glob("megatron_bridge-*.dist-info/METADATA")]
    return {path: _with_section(path, "[console_scripts]", lines) for path in points if lines}


def _with_section(path: Path, section: str, lines: Sequence[str]) -> str:
    text = path.read_text("utf-8") if path.is_file() else ""
    added = "\n".join(["", section, *lines, ""])
    if section in text and added not in text:
        raise ForkError(f"{path} has a section {section} already; add our scripts to it in fork/stack.py")
    return text if added in text else text + added


def _check_module(change: Change, source: Path, target: Path, pristine: bool) -> None:
    if not source.is_file():
        raise ForkError(f"change {change.name}: {source} does not exist; add it or take it off the change's modules")
    if pristine and target.exists():
        raise ForkError(
            f"change {change.name}: upstream has a module {source.name} at this path; rename ours, {source}"
        )
