# SPDX-License-Identifier: Apache-2.0
"""What a commit holds: a change with its tests and documentation, laid over a checkout at upstream's places.

What upstream has a form for (the licence header, a launcher script) is taken from the checkout.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import libcst as cst
import libcst.matchers as m

from fork import stack
from fork.change import Change, Sweep
from fork.edits import File
from fork.errors import EditError, ForkError
from fork.formatting import tidy
from fork.imports import missing


UNIT_TESTS = "tests/unit_tests"
TEST_GROUPS = "tests/functional_tests/test_groups"
LAUNCHERS = "tests/functional_tests/launch_scripts/h100/active"
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
IMPORTED = ("megatron.bridge", "tests.unit_tests")


def homes(changes: Iterable[Change]) -> dict[str, Path]:
    """Returns where each travelling unit test lies upstream, by the name that ours imports it by."""
    places = {ours: theirs for change in changes for ours, theirs in travelling(change).items()}
    return {Path(ours).stem: Path(UNIT_TESTS, theirs) for ours, theirs in places.items()}


def travelling(change: Change) -> dict[str, str]:
    """Returns the place of each unit test of ours in upstream's, by its path relative to the repository.

    Raises:
        ForkError: there is no such test.
    """
    places = {}
    for pattern, place in change.tests.items():
        ours = sorted(path.relative_to(stack.REPOSITORY).as_posix() for path in stack.REPOSITORY.glob(pattern))
        if not ours:
            raise ForkError(f"change {change.name}: {pattern} does not exist; add it or take it off changes/")
        places |= {path: f"{place}{Path(path).name}" if place.endswith("/") else place for path in ours}
    return places


def write(change: Change, homes: Mapping[str, Path], tree: Path, modules: Path = stack.MODULES) -> None:
    """Lays the change with its tests and documentation over `tree`, formatted by the settings there.

    Args:
        change: the change.
        homes: where each travelling unit test lies upstream, by the name that ours imports it by.
        tree: a checkout of upstream.
        modules: the folder that the new modules are in.

    Raises:
        EditError: an edit doesn't find its place.
        ForkError: the tree lacks what the commit imports, or ruff finds what it can't mend.
    """
    package = stack.find_package(tree)
    header = _header(package)
    touched = [package / path for path in stack.apply([change], tree, modules)]
    for module in change.modules:
        path = package / module
        path.write_text(_with_header(path.read_text("utf-8"), header), "utf-8")
    for ours, theirs in travelling(change).items():
        touched.append(_travel(stack.REPOSITORY / ours, tree / UNIT_TESTS / theirs, header, homes))
    for ours, theirs in change.functional.items():
        touched.append(_travel(stack.REPOSITORY / ours, tree / TEST_GROUPS / theirs, header, homes))
        _add_launcher(tree, theirs)
    try:
        touched += _edit(change, stack.read_release(package), tree)
        touched += _sweep(change.sweeps, tree)
    except EditError as error:
        raise EditError(f"{error}; look at the checkout and adjust changes/") from None
    tidy(tree, touched)
    python = [path for path in touched if path.suffix == ".py"]
    for path, name in missing(python, [package.parent.parent, tree], IMPORTED):
        raise ForkError(
            f"change {change.name}: {path.relative_to(tree)} imports {name}, which the checkout lacks; say in "
            "changes/ what change it stands on"
        )


def _edit(change: Change, release: str, tree: Path) -> list[Path]:
    """Edits the tests, documentation and scripts in `tree`, and returns the files."""
    touched = []
    for edit in (*change.upstream_tests, *change.docs, *change.others):
        path = tree / edit.path
        if isinstance(edit, File) and not edit.covers(release):
            continue
        text = _read(path, tree)
        path.write_text(edit.apply(text, release) if isinstance(edit, File) else edit.apply(text), "utf-8")
        touched.append(path)
    return touched


def _sweep(sweeps: Sequence[Sweep], tree: Path) -> list[Path]:
    """Lays the sweeps over `tree` and returns the files."""
    for sweep in sweeps:
        edited = sweep.apply({path: _read(tree / path, tree) for path in sweep.places})
        for path, text in edited.items():
            (tree / path).write_text(text, "utf-8")
    return [tree / path for sweep in sweeps for path in sweep.places]


def _read(path: Path, tree: Path) -> str:
    if not path.is_file():
        raise EditError(f"expected the file {path.relative_to(tree)} in the checkout, found none")
    return path.read_text("utf-8")


def _header(package: Path) -> str:
    """The licence header that upstream asks every file to have, as one of its files has it, of this year."""
    lines = (package / "package_info.py").read_text("utf-8").splitlines(keepends=True)
    end = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return _of_this_year("".join(lines[:end]))


def _of_this_year(text: str) -> str:
    return re.sub(r"(Copyright \(c\) )\d{4}", rf"\g<1>{datetime.datetime.now(datetime.UTC).year}", text, count=1)


def _with_header(text: str, header: str) -> str:
    return f"{header}\n{text.removeprefix(SPDX)}" if text.startswith(SPDX) and header else text


def _travel(source: Path, target: Path, header: str, homes: Mapping[str, Path]) -> Path:
    """Puts a test of ours at upstream's place, where tests import each other by package, and returns the place."""
    if not source.is_file():
        raise ForkError(f"{source} does not exist; add it or take it off changes/")
    _make_package(target.parent, header)
    tree = cst.parse_module(_with_header(source.read_text("utf-8"), header))
    target.write_text(tree.visit(_PackageImports(homes)).code, "utf-8")
    return target


def _make_package(folder: Path, header: str) -> None:
    """Makes the folder, and packages of what is new in a package."""
    if not folder.is_dir():
        _make_package(folder.parent, header)
        folder.mkdir()
        if (folder.parent / "__init__.py").is_file():
            (folder / "__init__.py").write_text(header, "utf-8")


class _PackageImports(cst.CSTTransformer):
    """Makes `from tiny_models import …` an import from where that helper is among upstream's tests."""

    def __init__(self, homes: Mapping[str, Path]):
        self.homes = homes

    def leave_ImportFrom(self, original: cst.ImportFrom, updated: cst.ImportFrom) -> cst.ImportFrom:
        if not m.matches(original.module, m.Name()) or original.relative or original.module.value not in self.homes:
            return updated
        home = self.homes[original.module.value].with_suffix("")
        return updated.with_changes(module=cst.parse_expression(".".join(home.parts)))


def _add_launcher(tree: Path, test: str) -> None:
    """Adds a launcher script for a functional test, made from one that upstream has."""
    folder = tree / LAUNCHERS
    model = next(iter(sorted(folder.glob("L0_Launch_converter*.sh"))), None)
    named = rf"{re.escape(TEST_GROUPS)}/\S+(?:\s+\\\n\s+{re.escape(TEST_GROUPS)}/\S+)*"
    found = re.findall(named, model.read_text("utf-8")) if model else []
    if len(found) != 1:
        raise EditError(f"expected a launcher script like L0_Launch_converter.sh in {LAUNCHERS}, found none")
    script = folder / f"L0_Launch_{Path(test).stem.removeprefix('test_')}.sh"
    text = model.read_text("utf-8").replace(found[0], f"{TEST_GROUPS}/{test}")
    script.write_text(_of_this_year(text), "utf-8")
    script.chmod(0o755)
