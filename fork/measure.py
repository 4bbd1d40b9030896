# SPDX-License-Identifier: Apache-2.0
"""How large each change of the stack is, and whether it keeps to its limit.

A change is measured as a commit over upstream's wheel. What the wheel lacks (upstream's tests, documentation, scripts)
is estimated from the edits; `upstream_pr` counts it in a checkout.
"""

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import Version
from rich.table import Table

from fork import stack, travel
from fork.change import LIMIT, Change, TextEdit
from fork.formatting import tidy
from fork.pull_request import count, git
from fork.requirements import covers
from fork.upstream import RELEASES, Upstream, obtain


LAST = max(map(Version, RELEASES))
MAIN = f"{LAST.major}.{LAST.minor + 1}.0"
"""What upstream's main calls itself, where the pull requests go."""
LAUNCHER = 26
"""Lines of a launcher script for a functional test."""
MOST = 600


@dataclass(frozen=True)
class Size:
    """The size of a change.

    Attributes:
        number: Its place in the stack, as the name of its file has it.
        change: The change.
        lines: Added and removed lines by file, by the path in a checkout.
    """

    number: str
    change: Change
    lines: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        """Added and removed lines together."""
        return sum(map(sum, self.lines.values()))

    def below(self, folder: str) -> int:
        """Returns the lines in files of `folder`."""
        return sum(sum(lines) for path, lines in self.lines.items() if path.startswith(f"{folder}/"))

    @property
    def limit(self) -> int:
        """The most lines that the change may have."""
        return self.change.limit


def measure(
    upstream: Upstream,
    given: Path | None = None,
    changes: Sequence[Change] | None = None,
    modules: Path = stack.MODULES,
) -> list[Size]:
    """Returns the size of each change, formatted as upstream formats.

    Args:
        upstream: the upstream version.
        given: upstream's wheel, for a host without network.
        changes: the stack; that of changes/ unless it is given.
        modules: the folder that the new modules are in.

    Raises:
        ForkError: upstream's wheel can't be had, an edit doesn't find its place, or a change doesn't stand alone.
    """
    numbers = [path.stem.partition("_")[0] for path in stack.files()]
    changes = stack.load() if changes is None else changes
    homes = travel.homes(changes)
    sizes = []
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        with zipfile.ZipFile(obtain(upstream, given)) as wheel:
            wheel.extractall(tree / "src")
        package = stack.find_package(tree)
        edited = {package / file.path for change in changes for file in change.edits}
        tidy(tree, [path for path in edited if path.is_file()])
        git(tree, "init", "--quiet")
        before = _snapshot(tree)
        for number, change in zip(numbers, changes, strict=False):
            travel.write(_in_package(change), homes, tree, modules)
            after = _snapshot(tree)
            lines = count(tree, before, after)
            for path, added, removed in _estimate(change):
                have = lines.get(path, (0, 0))
                lines[path] = (have[0] + added, have[1] + removed)
            sizes.append(Size(number, change, lines))
            before = after
    return sizes


def _snapshot(tree: Path) -> str:
    git(tree, "add", "--all")
    return git(tree, "write-tree")


def _in_package(change: Change) -> Change:
    """The part of a change that lies over the wheel."""
    return replace(
        change, upstream_tests=(), docs=(), others=(), sweeps=(), functional={}, requirements=(), scripts={}
    )


def _estimate(change: Change) -> Iterator[tuple[str, int, int]]:
    """About how many lines a change adds and removes outside of the package, by file."""
    for file in (*change.upstream_tests, *change.others, *change.docs):
        if isinstance(file, TextEdit):
            added = file.new.count("\n")
            yield file.path, max(1, added), int(added < 2)
        elif file.covers(MAIN):
            edits = sum(covers(edit.releases, MAIN) for edit in file.edits)
            yield file.path, edits, edits
    for sweep in change.sweeps:
        yield from ((path, places, places) for path, places in sweep.places.items())
    for ours, theirs in change.functional.items():
        yield f"{travel.TEST_GROUPS}/{theirs}", len((stack.REPOSITORY / ours).read_text("utf-8").splitlines()), 0
        yield f"{travel.LAUNCHERS}/{Path(theirs).stem}.sh", LAUNCHER, 0
    if change.requirements or change.scripts:
        yield "pyproject.toml", len(change.requirements) + len(change.scripts), len(change.requirements)


def problems(sizes: Sequence[Size]) -> list[str]:
    """Returns, one a line, what is against the rules of the stack."""
    found: list[str] = []
    before: set[str] = set()
    for size in sizes:
        change, name = size.change, f"change {size.change.name}"
        if size.total > size.limit:
            found.append(f"{name}: {size.total} changed lines, expected at most {size.limit}; cut it in two")
        if change.limit > MOST:
            found.append(f"{name}: the limit is {change.limit}, expected at most {MOST}; cut the change in two")
        if change.limit > LIMIT and not change.limit_reason:
            found.append(f"{name}: expected the reason of a limit above {LIMIT}; say it in `limit_reason`")
        missing = [each for each in ("problem", "changes", "unchanged", "tested") if not getattr(change, each)]
        if missing:
            found.append(f"{name}: expected {', '.join(missing)} for the text of its pull request, found none")
        if change.name in before:
            found.append(f"{name}: expected a name of its own, found two of this name; rename one of them")
        for other in set(change.stands_on) - before:
            found.append(f"{name}: stands on {other}, which does not come before it; renumber the changes")
        before.add(change.name)
    return found


def table(sizes: Sequence[Size]) -> Table:
    """Returns the stack in order, a change a row."""
    shown = Table("", "change", title="The stack", title_justify="left", caption_justify="left")
    for title in ("lines", "tests", "docs", "files", "limit"):
        shown.add_column(title, justify="right")
    shown.add_column("stands on")
    shown.add_column("upstream")
    for size in sizes:
        change = size.change
        total = f"{size.total}" if size.total <= size.limit else f"[bold red]{size.total}[/]"
        shown.add_row(
            size.number,
            f"[bold]{change.name}[/]\n{change.subject}",
            *(total, f"{size.below('tests')}", f"{size.below('docs')}", f"{len(size.lines)}"),
            f"{size.limit}",
            "\n".join(change.stands_on),
            change.status,
        )
    shown.caption = f"{len(sizes)} changes, {sum(size.total for size in sizes)} lines added and removed"
    return shown
