# SPDX-License-Identifier: Apache-2.0
"""The flows to compare: a copy, upstream's conversion, and the streaming one, in both directions."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import cache, memory, results
from benchmarks.memory import Run


@dataclass(frozen=True)
class Flow:
    """A command that writes a target folder from a source folder.

    Attributes:
        name: The name in tables and in the plot.
        description: A description in one line.
        command: The command, without source and target.
        memory: Bytes of memory that it needs for each byte of the source.
        marker: A pattern, below the folder of the target, of what it makes when it starts to convert. Empty for a flow
            that converts first, as upstream's do.
        exports: Whether its source is a Megatron checkpoint.
    """

    name: str
    description: str
    command: tuple[str, ...]
    memory: float = 0.0
    marker: str = ""
    exports: bool = False


_IN_MEMORY = (
    "import sys; from megatron.bridge import AutoBridge; AutoBridge.import_ckpt(*sys.argv[1:], streaming=False)"
)
_EXPORT_IN_MEMORY = (
    "import sys; from megatron.bridge import AutoBridge; "
    "source = AutoBridge.get_hf_model_id_from_checkpoint(sys.argv[1]); "
    "AutoBridge.from_hf_pretrained(source).export_ckpt(*sys.argv[1:], streaming=False)"
)
_COMMAND = str(Path(sys.executable).with_name("megatron-bridge"))
_TWO = "--processes=2"
STREAMING = Flow("streaming", "megatron-bridge import", (_COMMAND, "import"), marker="{target}/release.incomplete.*")
_EXPORT = Flow(
    results.EXPORT,
    "megatron-bridge export",
    (_COMMAND, "export"),
    marker="{target}.incomplete.*/**/*.safetensors",
    exports=True,
)
FLOWS = (
    Flow("cp -r", "cp -r of the checkpoint's files", ("cp", "-r")),
    Flow(
        "upstream",
        # Upstream's wheel of 0.6.2 doesn't run without CUDA, so upstream's code in the fork build runs instead.
        "import_ckpt(streaming=False): upstream 0.6.2's flow, low_memory_save, from the fork build, which writes a "
        "release checkpoint and runs without CUDA; 0.6.2 as published needs a GPU",
        (sys.executable, "-c", _IN_MEMORY),
        memory=1.15,
    ),
    STREAMING,
    replace(
        STREAMING,
        name=results.TWO,
        description=f"megatron-bridge import {_TWO}",
        command=(*STREAMING.command, _TWO),
    ),
    Flow("cp -r back", "cp -r of the Megatron checkpoint's files", ("cp", "-r"), exports=True),
    Flow(
        "upstream export",
        "export_ckpt(streaming=False): upstream 0.6.2's flow, from the fork build, which runs without CUDA",
        (sys.executable, "-c", _EXPORT_IN_MEMORY),
        memory=1.75,
        exports=True,
    ),
    _EXPORT,
    replace(
        _EXPORT,
        name=results.EXPORT_TWO,
        description=f"megatron-bridge export {_TWO}",
        command=(*_EXPORT.command, _TWO),
    ),
)


def measure(flow: Flow, source: Path, target: Path, log: Path) -> tuple[Run, float, float]:
    """Run a flow with the source not in the page cache, and remove the target.

    An import starts to convert when it makes its staging folder, an export when it makes its first file of weights.

    Args:
        flow: The flow to run.
        source: The checkpoint.
        target: A folder that doesn't exist.
        log: The file for the command's output.

    Returns:
        The run, the fraction of the source that was in the page cache before it, and the seconds that the disk took
        afterwards to write what the command had left in the page cache.
    """
    os.sync()
    cache.drop(source)
    warm = cache.cached(source)
    # A normal installation writes bytecode.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        marker = Path(flow.marker.format(target=target)) if flow.marker else None
        run = memory.run([*flow.command, str(source), str(target)], log, marker, env)
        synced = memory.run(["sync"], log)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return run, warm, synced.wall
