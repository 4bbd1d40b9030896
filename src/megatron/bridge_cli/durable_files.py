# SPDX-License-Identifier: Apache-2.0
"""What an import and a repair write so that it outlives a crash. It needs no torch."""

import os
from pathlib import Path


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is new for sure: through a link that lies there, this would write to somebody else's.

    Args:
        path: The file; what is there is removed first.
        data: What it holds, which is on the disk when this returns.

    Raises:
        OSError: It can't be written.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    Args:
        path: The file or folder.

    Raises:
        OSError: It can't be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
