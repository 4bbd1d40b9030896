# SPDX-License-Identifier: Apache-2.0
"""A release of fork builds: a wheel over each upstream version, checksums, notes."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from fork import backend, stack
from fork.errors import ForkError
from fork.upstream import RELEASES, Upstream


CHANGELOG = stack.REPOSITORY / "CHANGELOG.md"
TAG = f"release.{backend.RELEASE}"


def make(folder: Path, tag: str = TAG, releases: Sequence[Upstream] = tuple(RELEASES.values())) -> list[Path]:
    """Builds the wheels into `folder`, with SHA256SUMS and notes.md beside them, and returns the wheels.

    Args:
        folder: where they go.
        tag: the tag that is released; it says the number that the wheels have.
        releases: the upstream versions to build on.

    Raises:
        ForkError: the tag is not of these sources, the changelog doesn't know it, or a wheel can't be built.
    """
    if tag != TAG:
        raise ForkError(
            f"the tag {tag} is not that of these sources, {TAG}; set RELEASE in fork/backend.py, or tag {TAG}"
        )
    said = notes(CHANGELOG.read_text("utf-8"))
    wheels = [backend.build(folder, upstream) for upstream in releases]
    sums = {wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    (folder / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sums), "utf-8")
    rows = [["wheel", "Megatron-Bridge", "Megatron Core", "transformers"], ["---"] * 4]
    for wheel, upstream in zip(wheels, releases, strict=True):
        rows.append([f"`{wheel.name}`", upstream.version, upstream.megatron_core, upstream.transformers])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (folder / "notes.md").write_text(f"{said}\n\n{table}\n", "utf-8")
    return wheels


def notes(changelog: str) -> str:
    """Returns the changelog's section of this release; raises `ForkError` if there is none."""
    section = re.search(rf"^## \[{re.escape(TAG)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section[1].strip():
        raise ForkError(
            f"CHANGELOG.md has no section [{TAG}]; give what is under [Unreleased] this name, and the date"
        )
    return section[1].strip()
