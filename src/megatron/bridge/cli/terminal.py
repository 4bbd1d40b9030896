# SPDX-License-Identifier: Apache-2.0
"""What reaches the terminal while a subcommand runs: its own output, Bridge's warnings, and a progress bar."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import click

from megatron.bridge.cli.command import QUIETLY
from megatron.bridge.cli.text import printable
from megatron.bridge.release_checkpoint.leftovers import staging_folders


@dataclass(frozen=True)
class Terminal:
    """The terminal as the subcommand itself sees it, while `quiet` keeps other output away.

    Attributes:
        out: Standard output.
        err: Standard error.
        verbose: Whether the output of imported packages is shown.
        warnings: Bridge's warnings so far.
    """

    out: TextIO
    err: TextIO
    verbose: bool
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print a note. If there is a progress bar, the note takes its line, and the bar is drawn again below."""
        if _is_quiet():
            return
        bar = "\r\033[K" if self.err.isatty() else ""
        click.echo(f"{bar}Note: {printable(text)}", file=self.err)


@contextmanager
def quiet(verbose: bool) -> Iterator[Terminal]:
    """Keep the output of imported packages from the terminal; with `verbose`, send it to stderr.

    Bridge's warnings are printed at the end, after an error too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = Terminal(_own(sys.stdout, 1), _own(sys.stderr, 2), verbose)
    kept = [os.dup(1), os.dup(2)]
    try:
        with nullcontext(terminal.err) if verbose else open(os.devnull, "w") as sink:
            target = 2 if verbose else sink.fileno()
            os.dup2(target, 1)
            os.dup2(target, 2)
            with redirect_stdout(sink), redirect_stderr(sink), _warnings_into(terminal.warnings):
                yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for warning in terminal.warnings:
            click.echo(f"Warning: {warning}", err=True)


def _own(stream: TextIO, number: int) -> TextIO:
    """Return a stream that still writes where this one does when its descriptor leads to another file."""
    try:
        shared = stream.fileno() == number
    except (OSError, ValueError):
        shared = False
    return os.fdopen(os.dup(number), "w", buffering=1) if shared else stream


@contextmanager
def _warnings_into(warnings: list[str]) -> Iterator[None]:
    """Collect Bridge's warnings, each once and in one line."""

    def emit(record: logging.LogRecord) -> None:
        line = printable(" ".join(record.getMessage().split()))
        if line not in warnings:
            warnings.append(line)

    handler = logging.Handler(logging.WARNING)
    handler.emit = emit
    # Not megatron.bridge.utils, which warns of kernels that the host lacks. No conversion needs them.
    loggers = [logging.getLogger(f"megatron.bridge.{name}") for name in ("models", "training", "verify")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextmanager
def progress(terminal: Terminal, what: str, size: Callable[[], int], expected: int = 0) -> Iterator[None]:
    """Show a progress bar of the bytes written, if stderr is a terminal and the output isn't verbose."""
    if terminal.verbose or not terminal.err.isatty() or _is_quiet():
        yield
        return
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(file=terminal.err, highlight=False),
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    done = threading.Event()
    task = bar.add_task(what, total=expected or None)

    def follow() -> None:
        while not done.wait(0.25):
            bar.update(task, completed=min(size(), expected or sys.maxsize))

    with bar:
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


def _is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIETLY))


def staged_size(target: Path) -> int:
    """Return the bytes that this process has written so far of what will be called `target`."""
    own = f"-{os.getpid()}-"
    return sum(folder_size(folder) for folder in staging_folders(target.resolve()) if own in folder.name)


def folder_size(folder: Path) -> int:
    """Return the bytes in a folder that may grow, move or vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
