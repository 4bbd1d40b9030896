# SPDX-License-Identifier: Apache-2.0
"""Text for people: what may reach a terminal, sizes, and the notes that a module logs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """Replace what a terminal would obey in a text that may come from a hostile file."""
    return "".join(each if each.isprintable() else "?" for each in text)


def human_bytes(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000
    return f"{size:.4g} TB"


@contextmanager
def notes_of(name: str, tell: Callable[[str], None] = lambda note: None) -> Iterator[list[str]]:
    """Collect what a module logs at level INFO or above, each line once, and pass it to `tell` at once."""
    notes: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        note = record.getMessage()
        if note not in notes:
            notes.append(note)
            tell(note)

    handler = logging.Handler()
    handler.emit = emit
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
