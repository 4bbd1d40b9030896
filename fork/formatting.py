# SPDX-License-Identifier: Apache-2.0
"""Formatting by ruff, as upstream's own hooks do it."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from fork.errors import ForkError


STYLE = [
    "line-length = 119",
    "target-version = 'py310'",
    "lint.select = ['I']",
    "lint.isort.known-first-party = ['megatron.bridge']",
    "lint.isort.known-third-party = ['megatron', 'megatron.core', 'torch', 'transformers']",
    "lint.isort.lines-after-imports = 2",
]
"""The settings that matter here of upstream's ruff.toml, for a tree that doesn't have it."""


def tidy(tree: Path, paths: Iterable[Path]) -> None:
    """Lints and formats Python files in `tree` as upstream does.

    Raises:
        ForkError: ruff finds what it can't mend.
    """
    names = sorted({str(path.relative_to(tree)) for path in paths if path.suffix == ".py"})
    if not names:
        return
    style = [] if (tree / "ruff.toml").is_file() else ["--isolated", *(f"--config={line}" for line in STYLE)]
    for command in (["check", "--fix", "--quiet", "--output-format=concise"], ["format", "--quiet"]):
        line = [sys.executable, "-m", "ruff", *command, *style, "--force-exclude", "--no-cache", *names]
        done = subprocess.run(line, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            first = (done.stdout.strip() or done.stderr.strip()).splitlines()[0]
            raise ForkError(f"ruff with the checkout's configuration: {first}; mend it in src/, tests/ or changes/")
