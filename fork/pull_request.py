# SPDX-License-Identifier: Apache-2.0
"""The pull requests: the stack as commits on a new branch of a Megatron-Bridge checkout, and the text for each.

Everything is made in a temporary work tree of the checkout's repository; the checkout gets the branch at the end, or
nothing. What upstream has a form for (the licence header, the template of a pull request, a launcher script) is taken
from the checkout.
"""

import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m

from fork import stack
from fork.change import Change, Sweep
from fork.edits import File
from fork.errors import EditError, ForkError
from fork.imports import missing


UNIT_TESTS = "tests/unit_tests"
TEST_GROUPS = "tests/functional_tests/test_groups"
LAUNCHERS = "tests/functional_tests/launch_scripts/h100/active"
TEMPLATE = ".github/PULL_REQUEST_TEMPLATE.md"
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
IMPORTED = ("megatron.bridge", "megatron.bridge_cli", "tests.unit_tests")
TYPE_LABELS = {"fix": "bug", "docs": "docs", "ci": "ci"}


@dataclass(frozen=True)
class Commit:
    """A change as it was committed.

    Attributes:
        change: The change.
        sha: The commit.
        lines: Added and removed lines by what they are in: `LINES`.
    """

    change: Change
    sha: str
    lines: dict[str, tuple[int, int]]


LINES = ("upstream's modules", "new modules", "tests", "documentation", "other files")


def make(
    checkout: Path,
    changes: Sequence[Change],
    branch: str,
    out: Path,
    known: Sequence[Change] | None = None,
    modules: Path = stack.MODULES,
) -> list[Commit]:
    """Commits `changes` on the new branch `branch` of `checkout`, and writes patches and texts into the folder `out`.

    Args:
        checkout: a clean checkout of Megatron-Bridge; nothing in it changes but that it has a branch more.
        changes: the changes, in order.
        branch: the name of the branch, which starts at the checkout's HEAD.
        out: the folder for `git format-patch` and the text of each pull request; replaced.
        known: the changes that `changes` may stand on; those of changes/ unless they are given.
        modules: the folder that the new modules are in.

    Returns:
        The commits, without those of changes that the checkout has already.

    Raises:
        ForkError: the checkout is not clean or has the branch, or an edit doesn't find its place.
    """
    known = stack.load() if known is None else known
    homes = _homes([*known, *changes])
    _check(checkout, branch)
    commits = []
    with _worktree(checkout) as tree, tempfile.TemporaryDirectory() as scratch:
        base = _git(tree, "rev-parse", "HEAD")
        for change in changes:
            _check_tested(change)
            _check_ground(change, known, tree)
            try:
                _write(change, homes, tree, modules)
            except EditError as error:
                raise EditError(
                    f"change {change.name}: {str(error).removeprefix(f'change {change.name}: ')}"
                ) from None
            commit = _commit(change, tree)
            if commit is not None:
                commits.append(commit)
                text = _text(commit, tree)
                Path(scratch, f"{change.name}.md").write_text(text, "utf-8")
        if not commits:
            raise ForkError(f"{checkout} has all of these changes already; there is nothing to commit")
        _git(tree, "format-patch", "--quiet", f"--output-directory={scratch}", base)
        _publish(Path(scratch), out)
        _git(checkout, "branch", branch, commits[-1].sha)
    return commits


# --- the checkout ----------------------------------------------------------------------------------------------------


def _git(folder: Path, *command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise ForkError("expected git, found none; install it") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise ForkError(f"git {command[0]} in {folder}: {said[-1]}")
    return done.stdout.strip()


def _check(checkout: Path, branch: str) -> None:
    """Raises `ForkError` for a checkout that can't take the branch."""
    stack.find_package(checkout)
    if Path(_git(checkout, "rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
        raise ForkError(f"{checkout} is not the top of a git checkout; give the folder that holds .git")
    dirty = _git(checkout, "status", "--porcelain").splitlines()
    if dirty:
        raise ForkError(f"{checkout} has {len(dirty)} uncommitted changes ({dirty[0].strip()}); commit or stash them")
    if _git(checkout, "branch", "--list", branch):
        raise ForkError(f"{checkout} has a branch {branch} already; delete it or give another name with --branch")
    _git(checkout, "check-ref-format", "--branch", branch)
    for key in ("user.name", "user.email"):
        try:
            _git(checkout, "config", key)
        except ForkError:
            raise ForkError(f"git has no {key} to sign off with; set it with git config --global {key} …") from None


@contextmanager
def _worktree(checkout: Path) -> Iterator[Path]:
    """A work tree of its own at the checkout's HEAD, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, checkout.resolve().name)
        _git(checkout, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
        try:
            yield tree
        finally:
            _git(checkout, "worktree", "remove", "--force", str(tree))


def _check_tested(change: Change) -> None:
    """Raises `ForkError` for a change that would be proposed untested."""
    for name, there in {"tested": change.tested, "tests": change.tests or change.functional}.items():
        if not there:
            raise ForkError(f"change {change.name}: expected `{name}` in changes/, found none; add it there")


def _check_ground(change: Change, known: Sequence[Change], tree: Path) -> None:
    """Raises `ForkError` if a change that this one stands on has not been there before it."""
    for other in stack.select(known, change.stands_on) if change.stands_on else ():
        if not all((stack.find_package(tree) / module).is_file() for module in other.modules):
            raise ForkError(
                f"change {change.name} stands on {other.name}, which the checkout lacks; add --change {other.name}"
            )


# --- the tree --------------------------------------------------------------------------------------------------------


def _homes(changes: Iterable[Change]) -> dict[str, Path]:
    """Where each travelling unit test lies upstream, by the name that ours imports it by."""
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


def _write(change: Change, homes: Mapping[str, Path], tree: Path, modules: Path) -> None:
    """Lays the change with its tests and documentation over `tree`, formatted as upstream formats."""
    package = stack.find_package(tree)
    release = stack.read_release(package)
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
    for edit in (*change.upstream_tests, *change.docs, *change.others):
        path = tree / edit.path
        if isinstance(edit, File) and not edit.covers(release):
            continue
        try:
            text = _read(path, tree)
            edited = edit.apply(text, release) if isinstance(edit, File) else edit.apply(text)
        except EditError as error:
            raise EditError(f"{error}; look at the checkout and adjust changes/") from None
        path.write_text(edited, "utf-8")
        touched.append(path)
    touched += _sweep(change.sweeps, tree)
    python = [path for path in touched if path.suffix == ".py"]
    _format(tree, python)
    for path, name in missing(python, [package.parent.parent, tree], IMPORTED):
        raise ForkError(
            f"change {change.name}: {path.relative_to(tree)} imports {name}, which the checkout lacks; say in "
            "changes/ what change it stands on"
        )


def _sweep(sweeps: Sequence[Sweep], tree: Path) -> list[Path]:
    """Lays the sweeps over `tree` and returns the files."""
    for sweep in sweeps:
        try:
            edited = sweep.apply({path: _read(tree / path, tree) for path in sweep.places})
        except EditError as error:
            raise EditError(f"{error}; look at the checkout and adjust changes/") from None
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


def _format(tree: Path, paths: Sequence[Path]) -> None:
    """Lints and formats by the checkout's own configuration of ruff."""
    names = sorted({str(path.relative_to(tree)) for path in paths})
    for command in (["check", "--fix", "--quiet", "--output-format=concise"], ["format", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--force-exclude", "--no-cache", *names],
            cwd=tree,
            capture_output=True,
            text=True,
        )
        if done.returncode and names:
            first = (done.stdout.strip() or done.stderr.strip()).splitlines()[0]
            raise ForkError(f"ruff with the checkout's configuration: {first}; mend it in src/, tests/ or changes/")


def _commit(change: Change, tree: Path) -> Commit | None:
    """Commits what lies in `tree`; None if there is nothing to commit."""
    _git(tree, "add", "--all")
    if not _git(tree, "status", "--porcelain"):
        return None
    # A hook that the checkout has is for its own environment; ruff has been here.
    _git(tree, "commit", "--quiet", "--signoff", "--no-verify", f"--message={change.message}")
    lines = dict.fromkeys(LINES, (0, 0))
    there = set(_git(tree, "ls-tree", "-r", "--name-only", "HEAD~1").splitlines())
    for row in _git(tree, "diff", "--numstat", "--no-renames", "HEAD~1", "HEAD").splitlines():
        added, removed, path = row.split("\t")
        kind = _kind(path, path in there)
        lines[kind] = (lines[kind][0] + int(added), lines[kind][1] + int(removed))
    return Commit(change, _git(tree, "rev-parse", "HEAD"), lines)


def _kind(path: str, there: bool) -> str:
    if path.startswith("src/"):
        return "upstream's modules" if there else "new modules"
    return {"tests": "tests", "docs": "documentation"}.get(path.partition("/")[0], "other files")


# --- the text --------------------------------------------------------------------------------------------------------


def labels(change: Change) -> list[str]:
    """Returns the labels that upstream asks for: the type, the area, what the change adds."""
    kind, scope, breaking = re.match(r"(\w+)(?:\((\w+)\))?(!?): ", change.message).groups()
    area = scope or (kind if kind in ("build", "perf") else "misc")
    risk = ["breaking-change"] if breaking else []
    return [TYPE_LABELS.get(kind, "feature"), f"area:{area}", *risk, *change.labels, "needs-review"]


def table(commits: Sequence[Commit]) -> str:
    """Returns added and removed lines by change, as Markdown."""
    rows = [["change", *LINES], ["---"] * (len(LINES) + 1)]
    for commit in commits:
        rows.append([commit.change.name, *(f"+{added} −{removed}" for added, removed in commit.lines.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _text(commit: Commit, tree: Path) -> str:
    """The text to paste: title, labels, and upstream's template filled in."""
    change = commit.change
    subject, _, body = change.message.partition("\n")
    why = " ".join(change.why.split())
    # There a line break is one, and a commit message breaks its lines.
    what = re.sub(r"(?<!\n)\n(?!\n)", " ", f"{why}\n\n{body.strip()}")
    changelog = "\n".join(f"- {line}" for line in change.changes or [why])
    about = [
        "**How it was tested**",
        "",
        *(f"- {line}" for line in change.tested),
    ]
    if change.functional:
        about += ["- What the functional tests mark for a GPU has not been run: the author has none."]
    about += ["", "**Size**", "", table([commit]).rstrip()]
    if change.notes:
        about += ["", "**For the reviewer**", "", *(f"- {line}" for line in change.notes)]
    related = [f"- Related to #{number}" for number in change.issues] or ["- Related to no issue"]
    template = tree / TEMPLATE
    text = (
        template.read_text("utf-8")
        if template.is_file()
        else "# What does this PR do ?\n\n# Changelog\n\n# Additional Information\n"
    )
    for heading, filled in {
        "What does this PR do": what,
        "Changelog": changelog,
        "Additional Information": "\n".join([*related, "", *about]),
    }.items():
        text = _fill(text, heading, filled)
    text = _tick(text, {"tests": bool(change.tests), "documentation": bool(change.docs)})
    return f"Title: {subject}\nLabels: {', '.join(labels(change))}\n\n{text}"


def _fill(text: str, heading: str, filled: str) -> str:
    """Returns the template with the section `heading` filled; one that upstream has taken out goes to the end."""
    section = re.compile(rf"(^# {heading}[^\n]*\n)(.*?)(?=^# |\Z)", re.MULTILINE | re.DOTALL)
    if not section.search(text):
        return f"{text.rstrip()}\n\n# {heading}\n\n{filled}\n"
    return section.sub(lambda found: f"{found[1]}\n{filled}\n\n", text, count=1).rstrip() + "\n"


def _tick(text: str, done: Mapping[str, bool]) -> str:
    """Returns the template with the boxes ticked that the pull request itself answers."""
    for word in (word for word, is_done in done.items() if is_done):
        text = re.sub(rf"^- \[ \] (?=[^\n]*necessary {word})", "- [x] ", text, flags=re.MULTILINE)
    return text


def _publish(made: Path, out: Path) -> None:
    """Puts the patches and the texts into `out`, in the place of those of before."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in [*out.glob("*.patch"), *out.glob("*.md")]:
            old.unlink()
        for path in made.iterdir():
            shutil.copyfile(path, out / path.name)
    except OSError as error:
        raise ForkError(f"can't write to {out}: {error}; give another folder") from None
