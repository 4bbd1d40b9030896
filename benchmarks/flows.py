# SPDX-License-Identifier: Apache-2.0
"""What is compared: a copy, upstream's import and the streaming import, each a command that a user could type."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cache, memory
from benchmarks.memory import Run


@dataclass(frozen=True)
class Flow:
    """A way from one folder to another.

    Attributes:
        name: What tables and the plot call it.
        description: What it is, in a line.
        command: The command, to which source and target are added.
        memory: Bytes of memory that it needs for each byte of the source.
        stages_first: Whether `release.incomplete` is there when its conversion starts: upstream's flow converts first.
    """

    name: str
    description: str
    command: tuple[str, ...]
    memory: float = 0.0
    stages_first: bool = False


_IN_MEMORY = (
    "import sys; from megatron.bridge import AutoBridge; AutoBridge.import_ckpt(*sys.argv[1:], streaming=False)"
)

FLOWS = (
    Flow("cp -r", "cp -r of the checkpoint's files", ("cp", "-r")),
    Flow(
        "upstream",
        # 0.6.2 as it is on PyPI stops on a host without CUDA, so what runs is its own code in this wheel.
        "import_ckpt(streaming=False): upstream 0.6.2's flow, low_memory_save, from the patched wheel, which writes a "
        "release and runs without CUDA; 0.6.2 as published needs a GPU",
        (sys.executable, "-c", _IN_MEMORY),
        memory=1.15,
    ),
    Flow(
        "streaming",
        "megatron-bridge import",
        (str(Path(sys.executable).with_name("megatron-bridge")), "import"),
        stages_first=True,
    ),
)


def measure(flow: Flow, source: Path, target: Path, log: Path) -> tuple[Run, float, float]:
    """Run a flow with the source out of the page cache, and remove what it made.

    The conversion starts when `save_checkpoint` makes `release.incomplete`.

    Args:
        flow: What is run.
        source: The checkpoint.
        target: A folder that isn't there.
        log: Where the command's output goes.

    Returns:
        The run; the part of the source that was in the page cache before, from 0 to 1; and the seconds that the disk
        took afterwards for what the command had left in the page cache.
    """
    os.sync()
    cache.drop(source)
    warm = cache.cached(source)
    # Bytecode is kept, as pip leaves it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        marker = target / "release.incomplete" if flow.stages_first else None
        run = memory.run([*flow.command, str(source), str(target)], log, marker, env)
        synced = memory.run(["sync"], log)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return run, warm, synced.wall
