# SPDX-License-Identifier: Apache-2.0
"""Whether a tree of sources has what its modules import of Bridge, so that a commit works alone."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def missing(paths: Iterable[Path], roots: Sequence[Path], packages: Sequence[str]) -> list[tuple[Path, str]]:
    """Returns each file of `paths` with what it imports of `packages` that no folder of `roots` has.

    Args:
        paths: the files to look into.
        roots: folders that are on the path of imports.
        packages: dotted names, "megatron.bridge"; imports of others are not looked at.
    """
    return [
        (path, f"{name}.{attribute}".rstrip("."))
        for path in paths
        for name, attribute in sorted(set(imported(path.read_text("utf-8"))))
        if any(f"{name}.".startswith(f"{package}.") for package in packages)
        and not any(_has(root, name, attribute) for root in roots)
    ]


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Yields each import, at any depth, as its module and what is taken from that."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def _has(root: Path, name: str, attribute: str) -> bool:
    """Whether `name` is a module there, and a package of that name has the attribute."""
    folder = root.joinpath(*name.split("."))
    if folder.with_suffix(".py").is_file():
        return True
    if not attribute or (folder / f"{attribute}.py").is_file() or (folder / attribute).is_dir():
        return folder.is_dir()
    init = folder / "__init__.py"
    # It may make its names in more ways than can be told without running it.
    named = rf"\b{attribute}\b|import \*|__getattr__"
    return init.is_file() and re.search(named, init.read_text("utf-8")) is not None
