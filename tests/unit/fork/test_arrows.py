# SPDX-License-Identifier: Apache-2.0
"""What may import what: the command the library, the library the format, nothing the other way, and no circle."""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fork import backend, stack
from fork.imports import imported
from fork.upstream import LATEST, obtain


COMMAND, FORMAT = "megatron.bridge.cli", "megatron.bridge.release_checkpoint"
# What costs seconds to import, or isn't there where somebody only looks at a checkpoint.
HEAVY = ("torch", "transformers", "megatron.core", "megatron.training", "safetensors")


def names(path: Path) -> Iterator[str]:
    """The modules that a file imports, with what is taken from each as if it were one, too."""
    for module, attribute in imported(path.read_text("utf-8")):
        yield module
        if attribute:
            yield f"{module}.{attribute}"


def below(name: str, *packages: str) -> bool:
    return f"{name}.".startswith(tuple(f"{package}." for package in packages))


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


OURS = {dotted(path, stack.MODULES.parents[1]): path for path in sorted(stack.MODULES.parent.rglob("*.py"))}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The modules of the patched package, by their names."""
    root = tmp_path_factory.mktemp("wheel")
    given = os.environ.get(backend.WHEEL_VARIABLE)
    with zipfile.ZipFile(obtain(LATEST, Path(given) if given else None)) as wheel:
        wheel.extractall(root)
    stack.apply(stack.load(), root)
    return {dotted(path, root): path for path in (root / "megatron").rglob("*.py")}


def test_library_imports_nothing_of_the_command(modules: dict[str, Path]):
    # Most files of upstream's name no command, and reading them takes long.
    library = {name: path for name, path in modules.items() if not below(name, COMMAND)}
    suspects = {
        name: path for name, path in library.items() if re.search(r"bridge(\.| import )cli\b", path.read_text())
    }
    assert [name for name, path in suspects.items() if any(below(each, COMMAND) for each in names(path))] == []


@pytest.mark.parametrize("name", [name for name in OURS if below(name, FORMAT)])
def test_format_imports_neither_the_library_nor_what_is_heavy(name: str):
    wrong = {each for each in names(OURS[name]) if below(each, *HEAVY)}
    wrong |= {each for each in names(OURS[name]) if below(each, "megatron.bridge") and not below(each, FORMAT)}
    assert wrong - {"megatron.bridge", FORMAT.rpartition(".")[0]} == set()


def test_new_modules_import_each_other_in_no_circle():
    graph = {name: {each for each in names(path) if each in OURS and each != name} for name, path in OURS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_files_of_one_run_have_names_of_their_own():
    # pytest imports test files by their basename, and the session `unit` collects these folders together.
    tests = Path(__file__).parents[2]
    files = [path.name for folder in ("unit", "reliability") for path in (tests / folder).rglob("test_*.py")]
    assert [name for name, count in Counter(files).items() if count > 1] == []


def test_every_package_says_what_it_exports():
    packages = stack.MODULES.rglob("__init__.py")
    assert [str(path) for path in packages if "\n__all__" not in path.read_text("utf-8")] == []
