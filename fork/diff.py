# SPDX-License-Identifier: Apache-2.0
"""What the stack makes of an upstream version, as a unified diff. It quotes upstream, so it is never committed."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fork import backend, stack
from fork.change import Change
from fork.errors import ForkError
from fork.upstream import Upstream, obtain


def write(
    folder: Path,
    upstream: Upstream,
    given: Path | None = None,
    changes: Sequence[Change] | None = None,
    modules: Path = stack.MODULES,
) -> Path:
    """Writes the diff of the patched tree against `upstream` into `folder`, prints it, and returns its path.

    Args:
        folder: where the file goes; made if need be.
        upstream: the upstream version.
        given: upstream's wheel, for a host without network.
        changes: the stack; that of changes/ unless it is given.
        modules: the folder that the new modules are in.

    Raises:
        ForkError: upstream's wheel can't be had, an edit doesn't find its place, or git is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for side in ("a", "b"):
            with zipfile.ZipFile(obtain(upstream, given)) as wheel:
                wheel.extractall(Path(scratch, side))
        changes = stack.load() if changes is None else changes
        patched = Path(scratch, "b")
        stack.apply(changes, patched, modules, pristine=True)
        metadata = patched / f"megatron_bridge-{upstream.version}.dist-info" / "METADATA"
        backend.edit_metadata(metadata, changes, upstream)
        text = Path(scratch, f"{backend.stem(upstream)}.diff")
        text.write_bytes(_compare(scratch, "never"))
        sys.stdout.buffer.write(_compare(scratch, "always") if _in_colour() else text.read_bytes())
        sys.stdout.flush()
        return backend.publish(text, folder)


def _compare(folder: str, colour: str) -> bytes:
    command = [
        "git",
        "--no-pager",
        "diff",
        "--no-index",
        "--no-ext-diff",
        "--no-prefix",
        f"--color={colour}",
        "a",
        "b",
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True)
    except FileNotFoundError:
        raise ForkError("expected git, which compares the trees, found none; install it") from None
    # 1 says that there is a difference.
    if done.returncode > 1:
        raise ForkError(f"git can't compare the trees: {done.stderr.decode().strip().splitlines()[-1]}")
    return done.stdout


def _in_colour() -> bool:
    if "NO_COLOR" in os.environ:
        return False
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
