# SPDX-License-Identifier: Apache-2.0
"""Shortens what `import transformers` reads: the files of every installed package, and of its 400 models twice."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property


class Distributions(Mapping[str, list[str]]):
    """The distributions of each package, as `importlib.metadata.packages_distributions` gives them.

    Usually a package's distribution has its name. Only for others are the files of all distributions read.
    """

    def __getitem__(self, package: str) -> list[str]:
        if importlib.util.find_spec(package) is None:
            raise KeyError(package)
        own = _own_distribution(package)
        return [own] if own else self._all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @cached_property
    def _all(self) -> Mapping[str, list[str]]:
        return importlib.metadata.packages_distributions()


def _own_distribution(package: str) -> str | None:
    """Return the name of the distribution that is called like a package, if it contains the package."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = found.read_text("RECORD") or ""
    return found.metadata["Name"] if files.startswith(f"{package}/") or f"\n{package}/" in files else None


def short_scans() -> None:
    """Import transformers' import utilities so that they read little, unless they are imported already."""
    if "transformers" in sys.modules or importlib.util.find_spec("transformers") is None:
        return
    every = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = Distributions
    try:
        from transformers.utils import import_utils
    finally:
        importlib.metadata.packages_distributions = every
    if scan := getattr(import_utils, "create_import_structure_from_path", None):
        # It remembers what it read by folder, and is asked by file.
        import_utils.create_import_structure_from_path = lambda path: scan(  # type: ignore[assignment]
            os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
        )
