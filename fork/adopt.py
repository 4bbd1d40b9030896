# SPDX-License-Identifier: Apache-2.0
"""A new upstream version: what goes with it, whether every edit finds its place, and where it may be if not."""

import difflib
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

from fork import stack, syntax
from fork.change import Change
from fork.edits import Misplaced, Node, nodes
from fork.errors import EditError, UpstreamError
from fork.requirements import covers
from fork.upstream import RELEASES, Upstream, find, obtain


TABLE = stack.REPOSITORY / "fork" / "upstream.py"
NEAREST = 3


def look_up(version: str, megatron_core: str | None = None, transformers: str | None = None) -> Upstream:
    """Returns the upstream version as the table would have it.

    The Megatron Core is that of the table's release of the same minor version, else the newest that upstream's
    requirements take; transformers is the newest that they take.

    Args:
        version: the version on pip's index.
        megatron_core: the version to take instead.
        transformers: the version to take instead.

    Raises:
        UpstreamError: the index lacks the version, its hash, or what goes with it.
    """
    entry = find(f"megatron-bridge=={version}")
    sha256 = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    if sha256 is None:
        raise UpstreamError(
            f"the index gives no sha256 of megatron-bridge {version}; let pip use PyPI or a mirror of it"
        )
    asked = {each.name: each for each in map(Requirement, entry["metadata"]["requires_dist"]) if not each.marker}
    if megatron_core is None:
        alike = [each for each in RELEASES.values() if _minor(each.version) == _minor(version)]
        megatron_core = alike[-1].megatron_core if alike else _newest("megatron-core", asked)
    return Upstream(version, sha256, megatron_core, transformers or _newest("transformers", asked))


def _minor(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def _newest(package: str, asked: dict[str, Requirement]) -> str:
    if package not in asked:
        raise UpstreamError(f"expected a requirement of {package} in upstream's metadata, found none; say its version")
    return find(f"{package}{asked[package].specifier}")["metadata"]["version"]


def add_line(upstream: Upstream, table: Path = TABLE) -> None:
    """Adds the upstream version to the table, in order; one that is there stays as it is."""
    lines = table.read_text("utf-8").splitlines(keepends=True)
    rows = {at: re.match(r' {8}Upstream\("([^"]+)"', line) for at, line in enumerate(lines)}
    versions = {at: Version(found[1]) for at, found in rows.items() if found}
    if Version(upstream.version) in versions.values():
        return
    later = [at for at, version in versions.items() if version > Version(upstream.version)]
    lines.insert(later[0] if later else max(versions) + 1, upstream.line)
    table.write_text("".join(lines), "utf-8")


def misplaced(
    upstream: Upstream,
    given: Path | None = None,
    changes: Sequence[Change] | None = None,
    modules: Path = stack.MODULES,
) -> list[str]:
    """Returns what doesn't find its place in the upstream version, each with the nearest candidates in its source.

    Args:
        upstream: the upstream version.
        given: upstream's wheel, for a host without network.
        changes: the stack; that of changes/ unless it is given.
        modules: the folder that the new modules are in.

    Raises:
        ForkError: upstream's wheel can't be had.
    """
    # The changes ask the table for what goes with each release.
    RELEASES.setdefault(upstream.version, upstream)
    changes = stack.load() if changes is None else changes
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(obtain(upstream, given)) as wheel:
            wheel.extractall(scratch)
        package = stack.find_package(Path(scratch))
        sources = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
        found: list[Misplaced] = []
        stack.apply(changes, Path(scratch), modules, pristine=True, misplaced=found)
        metadata = Path(scratch, f"megatron_bridge-{upstream.version}.dist-info", "METADATA")
        asked = Metadata.from_email(metadata.read_bytes(), validate=False).requires_dist or []
        told = ["\n    ".join([each.message, *candidates(each, sources)]) for each in found]
        return told + _misplaced_requirements(asked, changes, upstream.version)


def _misplaced_requirements(asked: list[Requirement], changes: Sequence[Change], release: str) -> list[str]:
    told = []
    for change in changes:
        for edit in change.requirements:
            if covers(edit.releases, release):
                try:
                    asked = edit.apply(asked)
                except EditError as error:
                    near = difflib.get_close_matches(edit.name.split()[1], {each.name for each in asked}, NEAREST)
                    lines = [
                        f"change {change.name}: requirements: {edit.name}: {error}",
                        *(f"near: {each}" for each in near),
                    ]
                    told.append("\n    ".join(lines))
    return told


def candidates(each: Misplaced, sources: dict[str, str]) -> list[str]:
    """Returns, one a line, the places that are most like the one that was not found.

    Args:
        each: the edit.
        sources: upstream's files, by their path relative to megatron/bridge.
    """
    if each.edit is None:
        same_name = [path for path in sources if Path(path).name == Path(each.file).name]
        near = same_name or difflib.get_close_matches(each.file, sources, NEAREST)
        return [f"near: {path}" for path in near[:NEAREST]]
    wrapper = MetadataWrapper(cst.parse_module(sources[each.file]))
    positions = wrapper.resolve(PositionProvider)
    scope, node = each.edit.scope, each.edit.node
    try:
        places = syntax.find(wrapper.module, scope, node) if node else [syntax.find_definition(wrapper.module, scope)]
        if node and not places:
            places = _alike(syntax.find(wrapper.module, scope, Node("", *_kind(node))), _kind(node)[2])
    except EditError:
        definitions = syntax.find(wrapper.module, "", Node("", lambda x: isinstance(x, syntax.DEFINITION), (), ""))
        places = _alike(definitions, scope, _qualified)
    lines = sources[each.file].splitlines()
    numbers = [positions[place[-1]].start.line for place in places]
    return [f"near: {each.file}:{number}: {lines[number - 1].strip()}" for number in numbers]


def _kind(node: syntax.Matcher) -> tuple:
    """How to find nodes of the kind that the matcher is for: a test, the classes, and what the label should be."""
    # Of one that is put together, what is described in it tells best what it is about.
    described = next(iter(nodes(node)), None)
    if described:
        kinds, wanted = described.kinds, described.wanted
    else:
        kinds = (getattr(cst, type(node).__name__, type(None)),)
        wanted = ".".join(re.findall(r"Name\(value='(\w+)'", repr(node)))
    return lambda each: isinstance(each, kinds), kinds, wanted


def _qualified(path: syntax.Path) -> str:
    return ".".join(each.name.value for each in path if isinstance(each, syntax.DEFINITION))


def _alike(paths: list[syntax.Path], wanted: str, name=lambda path: syntax.label(path[-1])) -> list[syntax.Path]:
    """The paths whose names are most like `wanted`, the likest first."""
    likeness = {id(path): difflib.SequenceMatcher(None, wanted, name(path)).ratio() for path in paths}
    return sorted(paths, key=lambda path: -likeness[id(path)])[:NEAREST]
