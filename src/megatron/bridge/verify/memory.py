# SPDX-License-Identifier: Apache-2.0
"""Whether a model fits in the memory of this host, in float32."""

from pathlib import Path


BASE = 3 << 30
"""Bytes for the packages, 512 tokens and their logits."""
_EACH = 6
"""Bytes of a parameter: a model in float32, and what loading it needs."""


def fits(parameters: int) -> bool:
    """Return whether a model of so many parameters can be computed in what is free. Both models take turns."""
    return BASE + _EACH * parameters < free_memory()


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still use: of the host, and of its control group."""
    lines = (proc / "meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    try:
        most, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return free if most == "max" else min(free, int(most) - int(used) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return free
