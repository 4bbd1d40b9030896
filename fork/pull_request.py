# SPDX-License-Identifier: Apache-2.0
"""The pull requests: the stack as commits on a new branch of a Megatron-Bridge checkout, and the text for each.

Everything is made in a temporary work tree of the checkout's repository; the checkout gets the branch at the end, or
nothing. What upstream has a form for (the licence header, the template of a pull request, a launcher script) is taken
from the checkout.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fork import pull_request_text, stack, travel
from fork.change import Change
from fork.errors import EditError, ForkError
from fork.upstream_tests import Comparison


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
    check: Path | None = None,
) -> list[Commit]:
    """Commits `changes` on the new branch `branch` of `checkout`, and writes patches and texts into the folder `out`.

    Args:
        checkout: a clean checkout of Megatron-Bridge; nothing in it changes but that it has a branch more.
        changes: the changes, in order.
        branch: the name of the branch, which starts at the checkout's HEAD.
        out: the folder for `git format-patch` and the text of each pull request; replaced.
        known: the changes that `changes` may stand on; those of changes/ unless they are given.
        modules: the folder that the new modules are in.
        check: the interpreter of an environment that has what Megatron-Bridge and its tests import. It runs upstream's
            unit tests of what each commit touches, which have to do what they did before the first.

    Returns:
        The commits, without those of changes that the checkout has already.

    Raises:
        ForkError: the checkout is not clean or has the branch, an edit doesn't find its place, or a test fails that
            passed before.
    """
    known = stack.load() if known is None else known
    homes = travel.homes([*known, *changes])
    _check(checkout, branch)
    commits, worse = [], []
    with (
        _worktree(checkout) as tree,
        _worktree(checkout) as before,
        tempfile.TemporaryDirectory() as scratch,
        Comparison(check, before, out / "outcomes") if check else nullcontext() as tests,
    ):
        base = git(tree, "rev-parse", "HEAD")
        for change in changes:
            _check_tested(change)
            _check_ground(change, known, tree)
            try:
                travel.write(change, homes, tree, modules)
            except EditError as error:
                raise EditError(
                    f"change {change.name}: {str(error).removeprefix(f'change {change.name}: ')}"
                ) from None
            commit = _commit(change, tree)
            if commit is not None:
                commits.append(commit)
                text = pull_request_text.compose(change, table([commit]), tree)
                Path(scratch, f"{change.name}.md").write_text(text, "utf-8")
            if commit is not None and tests is not None:
                print(f"testing {change.name}", file=sys.stderr, flush=True)
                worse += [f"{change.name}: {each}" for each in tests.worse(tree, count(tree, "HEAD~1", "HEAD"))]
        if not commits:
            raise ForkError(f"{checkout} has all of these changes already; there is nothing to commit")
        if worse:
            raise ForkError("\n".join(["expected upstream's tests to do what they did before", *worse]))
        git(tree, "format-patch", "--quiet", f"--output-directory={scratch}", base)
        _publish(Path(scratch), out)
        git(checkout, "branch", branch, commits[-1].sha)
    return commits


# --- the checkout ----------------------------------------------------------------------------------------------------


def git(folder: Path, *command: str) -> str:
    """Runs git in `folder` and returns what it prints; raises `ForkError`."""
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
    if Path(git(checkout, "rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
        raise ForkError(f"{checkout} is not the top of a git checkout; give the folder that holds .git")
    dirty = git(checkout, "status", "--porcelain").splitlines()
    if dirty:
        raise ForkError(f"{checkout} has {len(dirty)} uncommitted changes ({dirty[0].strip()}); commit or stash them")
    if git(checkout, "branch", "--list", branch):
        raise ForkError(f"{checkout} has a branch {branch} already; delete it or give another name with --branch")
    git(checkout, "check-ref-format", "--branch", branch)
    for key in ("user.name", "user.email"):
        try:
            git(checkout, "config", key)
        except ForkError:
            raise ForkError(f"git has no {key} to sign off with; set it with git config --global {key} …") from None


@contextmanager
def _worktree(checkout: Path) -> Iterator[Path]:
    """A work tree of its own at the checkout's HEAD, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, checkout.resolve().name)
        git(checkout, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
        try:
            yield tree
        finally:
            git(checkout, "worktree", "remove", "--force", str(tree))


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


# --- the commits -----------------------------------------------------------------------------------------------------


def _commit(change: Change, tree: Path) -> Commit | None:
    """Commits what lies in `tree`; None if there is nothing to commit."""
    git(tree, "add", "--all")
    if not git(tree, "status", "--porcelain"):
        return None
    # A hook that the checkout has is for its own environment; ruff has been here.
    git(tree, "commit", "--quiet", "--signoff", "--no-verify", f"--message={change.message}")
    rows = count(tree, "HEAD~1", "HEAD")
    there = set(git(tree, "ls-tree", "-r", "--name-only", "HEAD~1").splitlines())
    lines = dict.fromkeys(LINES, (0, 0))
    for path, (added, removed) in rows.items():
        kind = _kind(path, path in there)
        lines[kind] = (lines[kind][0] + added, lines[kind][1] + removed)
    return Commit(change, git(tree, "rev-parse", "HEAD"), lines)


def count(tree: Path, before: str, after: str) -> dict[str, tuple[int, int]]:
    """Returns the added and removed lines of each file between two trees of the repository `tree`."""
    rows = git(tree, "diff", "--numstat", "--no-renames", before, after).splitlines()
    return {path: (int(added), int(removed)) for added, removed, path in (row.split("\t") for row in rows)}


def _kind(path: str, there: bool) -> str:
    if path.startswith("src/"):
        return "upstream's modules" if there else "new modules"
    return {"tests": "tests", "docs": "documentation"}.get(path.partition("/")[0], "other files")


def table(commits: Sequence[Commit]) -> str:
    """Returns added and removed lines by change, as Markdown."""
    rows = [["change", *LINES], ["---"] * (len(LINES) + 1)]
    for commit in commits:
        rows.append([commit.change.name, *(f"+{added} −{removed}" for added, removed in commit.lines.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


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
