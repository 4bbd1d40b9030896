# SPDX-License-Identifier: Apache-2.0
"""Edits of a package's requirements, as data: what the metadata of a wheel asks for, changed by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from fork.errors import EditError


def covers(releases: str, release: str) -> bool:
    """Whether `releases`, a specifier, holds `release`; a pre-release counts as the release that it leads to."""
    return SpecifierSet(releases).contains(Version(release).base_version)


@dataclass(frozen=True)
class RequirementEdit:
    """One edit of the list of requirements.

    Args:
        name: what the edit does, for messages.
        apply: takes the requirements and returns the edited ones; raises `EditError`.
        releases: specifier of the upstream versions that need the edit; empty for all.
    """

    name: str
    apply: Callable[[list[Requirement]], list[Requirement]]
    releases: str = ""


def move(package: str, extra: str, *, releases: str = "") -> RequirementEdit:
    """Moves the requirement of `package` from the base to `extra`."""

    def apply(requirements: list[Requirement]) -> list[Requirement]:
        names = [each.name for each in requirements if f'extra == "{extra}"' in str(each.marker or "")]
        if any(_same(name, package) for name in names) and not any(_is_base(each, package) for each in requirements):
            return requirements
        return [into(each, extra) if _is_base(each, package) else each for each in _having(requirements, package)]

    return RequirementEdit(f"move {package} to the extra {extra}", apply, releases)


def replace(package: str, *new: str, releases: str = "") -> RequirementEdit:
    """Replaces the base's requirement of `package` by `new`; one for an extra says so in its marker."""

    def apply(requirements: list[Requirement]) -> list[Requirement]:
        if all(Requirement(text) in requirements for text in new):
            return requirements
        kept = []
        for each in _having(requirements, package):
            kept += [Requirement(text) for text in new] if _is_base(each, package) else [each]
        return kept

    return RequirementEdit(f"replace {package}", apply, releases)


def add(requirement: str, *, releases: str = "") -> RequirementEdit:
    """Adds `requirement` to the base; one that is there already stays as it is."""
    new = Requirement(requirement)

    def apply(requirements: list[Requirement]) -> list[Requirement]:
        return requirements if any(_is_base(each, new.name) for each in requirements) else [*requirements, new]

    return RequirementEdit(f"add {new.name}", apply, releases)


def edit(requirements: Sequence[str], edits: Sequence[RequirementEdit], release: str) -> list[str]:
    """Returns `requirements` with the edits that upstream's `release` needs; raises `EditError`."""
    parsed = [Requirement(each) for each in requirements]
    for each in edits:
        if covers(each.releases, release):
            try:
                parsed = each.apply(parsed)
            except EditError as error:
                raise EditError(f"requirements: {each.name}: {error}") from None
    return [str(each) for each in dict.fromkeys(parsed)]


def extras(requirements: Sequence[str]) -> list[str]:
    """Returns the extras that the markers of `requirements` name, in order."""
    named = [re.findall(r'extra == "([^"]+)"', each) for each in requirements]
    return list(dict.fromkeys(extra for each in named for extra in each))


def _is_base(requirement: Requirement, package: str) -> bool:
    return _same(requirement.name, package) and "extra" not in str(requirement.marker or "")


def _same(one: str, other: str) -> bool:
    return canonicalize_name(one) == canonicalize_name(other)


def _having(requirements: list[Requirement], package: str) -> list[Requirement]:
    if not any(_is_base(each, package) for each in requirements):
        raise EditError(f"expected a requirement of {package}, found none")
    return requirements


def into(requirement: Requirement, extra: str) -> Requirement:
    """Returns the requirement as one of `extra`."""
    spec = str(requirement).partition(";")[0].strip()
    marker = f"({requirement.marker}) and " if requirement.marker else ""
    return Requirement(f'{spec}; {marker}extra == "{extra}"')
