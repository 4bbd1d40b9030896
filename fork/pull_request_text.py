# SPDX-License-Identifier: Apache-2.0
"""The text of a pull request: title, labels, and upstream's template filled in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fork.change import Change
from fork.errors import ForkError


TEMPLATE = ".github/PULL_REQUEST_TEMPLATE.md"
HEADINGS = ("What does this PR do", "Changelog", "Additional Information")
TYPE_LABELS = {"fix": "bug", "docs": "docs", "ci": "ci"}


def labels(change: Change) -> list[str]:
    """Returns the labels that upstream asks for: the type, the area, what the change adds.

    Raises:
        ForkError: the subject has another form.
    """
    subject = re.match(r"(\w+)(?:\(([\w-]+)\))?(!?): ", change.message)
    if not subject:
        raise ForkError(
            f"change {change.name}: the subject is {change.subject!r}, expected `type(scope): what it does`; reword it"
        )
    kind, scope, breaking = subject.groups()
    area = scope or (kind if kind in ("build", "perf") else "misc")
    risk = ["breaking-change"] if breaking else []
    return [TYPE_LABELS.get(kind, "feature"), f"area:{area}", *risk, *change.labels, "needs-review"]


def compose(change: Change, size: str, tree: Path) -> str:
    """Returns the text to paste.

    Args:
        change: the change.
        size: its added and removed lines, as a Markdown table.
        tree: the checkout, which has the template.
    """
    body = change.message.partition("\n")[2].strip().split("\n\n")
    # The first of several paragraphs says what goes wrong, and so does `problem`.
    told = body[1:] if change.problem and len(body) > 1 else body
    # There a line break is one, and a commit message breaks its lines.
    what = [" ".join(each.split()) for each in (change.problem or change.why, *told)]
    tested = [*change.tested]
    if change.functional:
        tested.append("The functional tests need two GPUs and have not been run: the author has none.")
    about = [
        "\n".join([f"- Related to #{number}" for number in change.issues] or ["- Related to no issue"]),
        _section("What does not change", change.unchanged),
        _section("How it was tested", tested),
        _section("Left for later", change.later),
        _section("For the reviewer", change.notes),
        f"**Size**\n\n{size.rstrip()}",
    ]
    template = tree / TEMPLATE
    text = template.read_text("utf-8") if template.is_file() else "\n".join(f"# {each}\n" for each in HEADINGS)
    for heading, filled in zip(HEADINGS, (what, [_list(change.changes)], about), strict=True):
        text = _fill(text, heading, "\n\n".join(filter(None, filled)))
    text = _tick(text, {"tests": bool(change.tests), "documentation": bool(change.docs)})
    return f"Title: {change.subject}\nLabels: {', '.join(labels(change))}\n\n{text}"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _section(title: str, lines: Sequence[str]) -> str:
    return f"**{title}**\n\n{_list(lines)}" if lines else ""


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
