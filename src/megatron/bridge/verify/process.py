# SPDX-License-Identifier: Apache-2.0
"""Starts a process of a proof (`__main__.py`), asks it its question, and ends it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self


IN_PROOF = "MEGATRON_BRIDGE_IN_PROOF"
_VARIABLES = {
    # A proof is computed on the CPU, wherever it runs.
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), ""),
    # Megatron-LM asserts it (validate_args in megatron/training/arguments.py, core 0.19).
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # An import in such a process is part of a proof, and needs none.
    IN_PROOF: "1",
}
# Variables that torchrun and an import without CUDA set. This process is no rank.
_NOT_PASSED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_ELASTIC = "TORCHELASTIC_"


class Process:
    """A process that answers one question. It imports what it needs as soon as it is made.

    Args:
        task: What it does: "megatron-lm" and "bridge" compare logits, "twin" makes and imports a twin.
        module: The module that it runs.
    """

    def __init__(self, task: str, module: str = "megatron.bridge.verify") -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _NOT_PASSED and not name.startswith(_ELASTIC)
        }
        # A process that starts others, which end with it. The others stay in the group of who starts them.
        self._leads = module != "megatron.bridge.verify"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=kept | _VARIABLES,
            cwd=Path.cwd(),
            process_group=0 if self._leads else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def send(self, request: dict[str, Any]) -> None:
        """Ask, without waiting for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer. If the process ends without one, return `error` and `by`, which is "process"."""
        assert self._process.stdout is not None
        text = self._process.stdout.read()
        code = self._process.wait()
        try:
            return json.loads(text)
        except ValueError:
            self._log.seek(0)
            last = self._log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            killed = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return {"error": f"the process {killed}: {last[:300]}", "by": "process"}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.send(request)
        return self.answer()

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._leads:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe and pipe.close()
        self._process.wait()
        self._log.close()
