# SPDX-License-Identifier: Apache-2.0
"""A change of the stack: all that the wheel, the commit and the pull request need to know of it, in one object."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fork.edits import File
from fork.errors import EditError
from fork.requirements import RequirementEdit


LIMIT = 400
"""A change has at most so many changed lines, unless it says why it needs more."""
LOCK = "`uv.lock` is unchanged, and the images are built with `--locked`: run `uv lock` before the merge."


@dataclass(frozen=True)
class TextEdit:
    """One edit of a file that is not Python.

    Args:
        path: the file, relative to the checkout.
        name: what the edit does, for messages.
        pattern: what is replaced, a regular expression for `re.MULTILINE` that is there just once.
        new: what takes its place, with `re`'s references.
        done: text that is in the file once the edit was made.
    """

    path: str
    name: str
    pattern: str
    new: str
    done: str

    def apply(self, text: str) -> str:
        """Returns the edited text; raises `EditError`."""
        if self.done in text:
            return text
        edited, count = re.subn(self.pattern, self.new, text, flags=re.MULTILINE)
        if count != 1:
            raise EditError(f"{self.path}: {self.name}: expected 1 place, found {count}")
        return edited


def insert_before_heading(path: str, heading: str, text: str) -> TextEdit:
    """Inserts `text`, which begins with a heading of its own, before the line `heading`."""
    escaped = text.replace("\\", r"\\")
    name = f"insert before the heading {heading!r}"
    return TextEdit(path, name, rf"^(?={re.escape(heading)}$)", escaped, done=text.partition("\n")[0] + "\n")


@dataclass(frozen=True)
class Sweep:
    """One rule for the text of many files, with the number of places in each.

    Args:
        name: what the rule does, for messages.
        pattern: what is replaced, a regular expression for `re.MULTILINE`.
        new: what takes its place, with `re`'s references.
        places: how many places each file has, by its path relative to the checkout.
    """

    name: str
    pattern: str
    new: str
    places: Mapping[str, int]

    def apply(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Returns the edited texts by path; those that have no place left in any file were swept before.

        Raises:
            EditError: a file has another number of places.
        """
        swept = {path: re.subn(self.pattern, self.new, text, flags=re.MULTILINE) for path, text in texts.items()}
        if not any(count for _, count in swept.values()):
            return dict(texts)
        for path, (_, count) in swept.items():
            if count != self.places[path]:
                raise EditError(f"{path}: {self.name}: expected {self.places[path]} places, found {count}")
        return {path: text for path, (text, _) in swept.items()}


@dataclass(frozen=True)
class Change:
    """One change of the stack: a commit that upstream could take alone, and its pull request.

    A change without edits, modules, requirements and scripts is a pull request only: the wheel doesn't have it.

    Args:
        name: the name on the command line and in messages.
        message: the commit message: a subject in the form of Conventional Commits, and a body.
        why: one sentence for the wheel's NOTICE.
        edits: the files of upstream's package that change.
        modules: new modules, paths relative to megatron/bridge.
        requirements: edits of the wheel's requirements, see `fork.requirements`.
        scripts: commands that an installation gets, each with the function that it calls, as "module:function".
        status: how far it is upstream: "not proposed", "proposed in #1", "merged in #1".
        issues: the numbers of upstream's issues that it answers.
        stands_on: the changes that it needs, by name; each comes before it.
        limit: the most lines that it may add and remove together, tests and documentation included.
        limit_reason: why `limit` is above 400; it may be 600 at most.
        tests: our unit tests and their helpers, as patterns relative to this repository, and where they go in
            upstream's tests/unit_tests; a place that ends in "/" is a folder. There has to be one here or in
            `functional`. Those that only work in upstream's tree lie in changes/tests/.
        functional: functional tests, likewise, and where they go in upstream's test groups; each gets a launcher.
        upstream_tests: edits of upstream's own tests, whose expectations change; paths relative to the checkout.
        docs: edits of upstream's documentation.
        others: edits of upstream's scripts, examples and configuration, paths relative to the checkout.
        sweeps: rules over many of its files, in order, after the other edits.
        problem: what goes wrong today, in about three sentences, with the command that fails.
        changes: what changes for a user, a line each.
        unchanged: what stays as it was, a line each.
        tested: how the change was tested, a line each; there has to be one.
        later: what is left for later, a line each.
        notes: what else a reviewer should know, a line each.
        labels: labels beside the type, the area and breaking-change, which follow from the subject.
    """

    name: str
    message: str
    why: str

    edits: Sequence[File] = ()
    modules: Sequence[str] = ()
    requirements: Sequence[RequirementEdit] = ()
    scripts: Mapping[str, str] = field(default_factory=dict)

    status: str = "not proposed"
    issues: Sequence[int] = ()
    stands_on: Sequence[str] = ()
    limit: int = LIMIT
    limit_reason: str = ""

    tests: Mapping[str, str] = field(default_factory=dict)
    functional: Mapping[str, str] = field(default_factory=dict)
    upstream_tests: Sequence[File] = ()
    docs: Sequence[TextEdit] = ()
    others: Sequence[File | TextEdit] = ()
    sweeps: Sequence[Sweep] = ()

    problem: str = ""
    changes: Sequence[str] = ()
    unchanged: Sequence[str] = ()
    tested: Sequence[str] = ()
    later: Sequence[str] = ()
    notes: Sequence[str] = ()
    labels: Sequence[str] = ()

    @property
    def subject(self) -> str:
        """The first line of the commit message."""
        return self.message.partition("\n")[0]

    @property
    def in_wheel(self) -> bool:
        """Whether the change touches the wheel; otherwise it is a pull request only."""
        return bool(self.edits or self.modules or self.requirements or self.scripts)
