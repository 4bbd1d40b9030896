# SPDX-License-Identifier: Apache-2.0
"""Holds each rank of a command where it begins to write weights, so that a test can end it there.

Python runs this module at its start if PYTHONPATH has the folder. HELD is a folder for files of the ranks' numbers.
"""

import os
import signal
import sys
import time
from pathlib import Path


HELD = Path(os.environ["HELD"])


def begins_to_write(event: str, args: tuple) -> bool:
    if event != "open" or "RANK" not in os.environ or not isinstance(args[0], str | os.PathLike):
        return False
    # Rank 0 has made the files of an export before.
    writes = os.O_WRONLY if (name := os.fspath(args[0])).endswith(".distcp") else os.O_RDWR
    return name.endswith((".distcp", ".safetensors")) and bool(args[2] & writes)


def hold(event: str, args: tuple) -> None:
    if begins_to_write(event, args):
        handler = signal.getsignal(signal.SIGTERM)
        (HELD / os.environ["RANK"]).write_text(str(os.getpid()))
        try:
            # A rank that is interrupted has another handler then, and this may not be its main thread.
            while not (HELD / "go").exists() and signal.getsignal(signal.SIGTERM) == handler:
                time.sleep(0.01)
        finally:
            (HELD / f"{os.environ['RANK']} goes on").touch()


sys.addaudithook(hold)
