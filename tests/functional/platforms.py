# SPDX-License-Identifier: Apache-2.0
"""The accelerator: found, never assumed, and what follows from it for Megatron-LM.

    python tests/functional/platforms.py           # what this machine has, as JSON
    python tests/functional/platforms.py cuda      # the same, or one line that says why there is no CUDA here
    python tests/functional/platforms.py --flags   # the flags of Megatron-LM that follow

A platform is a row of `PLATFORMS`; what a library would have to provide so that a fusion works is a row of `FUSIONS`.
"""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any


class PlatformError(Exception):
    """The platform that was asked for is not here."""


@dataclass(frozen=True)
class Platform:
    """What is true of every host of a kind.

    Attributes:
        name: What the session and the report call it.
        backend: What torch calls its collectives; RCCL is "nccl" to torch.
        library: What the collectives really are.
        flags: Megatron-LM's flags, whatever libraries the host has.
        visibility: The variables that choose devices, the one that torch reads first in front.
        environment: Variables that a step needs there.
    """

    name: str
    backend: str
    library: str
    flags: tuple[str, ...]
    visibility: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


_GPU_FLAGS = ("--distributed-backend=nccl", "--bf16", "--clip-grad=1")

# float32 on the CPU, where Hugging Face's loss can be compared to four digits; the emulation can do bf16 too.
PLATFORMS = {
    row.name: row
    for row in (
        Platform(
            "cpu",
            "gloo",
            "gloo",
            flags=(
                "--distributed-backend=gloo",
                "--clip-grad=1",
                "--no-bias-gelu-fusion",
                "--no-bias-swiglu-fusion",
                "--no-bias-dropout-fusion",
            ),
            # The emulation of torch.cuda refuses to work beside a device. -1 ends the list of devices for CUDA,
            # HIP and torch (`_parse_visible_devices`) alike.
            environment={"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"},
        ),
        Platform("cuda", "nccl", "NCCL", flags=_GPU_FLAGS, visibility=("CUDA_VISIBLE_DEVICES",)),
        # The order is torch's own (`torch/cuda/__init__.py`, `_parse_visible_devices`, 2.11).
        Platform(
            "rocm",
            "nccl",
            "RCCL",
            flags=_GPU_FLAGS,
            visibility=("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        ),
    )
}

# Ranks on the CPU are processes that share its cores; four cover every kind of parallelism.
CPU_RANKS = 4

# What can be imported makes these work; AMD's Transformer Engine has the name of NVIDIA's. Apex is looked for by its
# extensions: a build without them imports just as well.
LIBRARIES = {
    "transformer_engine": "transformer_engine.pytorch",
    "apex softmax": "scaled_upper_triang_masked_softmax_cuda",
    "apex wgrad": "fused_weight_gradient_mlp_cuda",
}

# Flags that a host needs when it lacks the library, and who insists on it (core 0.19.2).
FUSIONS = (
    # `megatron/core/transformer/torch_norm.py`, `WrappedTorchNorm`: local RMSNorm asserts it
    ("transformer_engine", "--no-persist-layer-norm"),
    # `megatron/core/transformer/transformer_config.py`: "apply_rope_fusion is not available"
    ("transformer_engine", "--no-rope-fusion"),
    # `megatron/core/fusions/fused_softmax.py`: half precision imports Apex's kernel
    ("apex softmax", "--no-masked-softmax-fusion"),
    # `megatron/core/tensor_parallel/layers.py`, `ColumnParallelLinear`: the output layer, with Transformer Engine too
    ("apex wgrad", "--no-gradient-accumulation-fusion"),
)

PACKAGES = ("megatron-bridge", "megatron-core", "transformers")


@dataclass(frozen=True)
class Host:
    """What was found on this host.

    Attributes:
        platform: Its kind.
        ranks: The most ranks that a row may have: devices, or on the CPU processes.
        device: The device's name.
        libraries: Version of each of `LIBRARIES` that can be imported.
        missing: For each of the others, why not.
        versions: What the report says beside a result.
    """

    platform: Platform
    ranks: int
    device: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def transformer_engine(self) -> str | None:
        """The version of Transformer Engine, NVIDIA's or AMD's, if it can be used."""
        return self.libraries.get("transformer_engine")

    @property
    def lacks_transformer_engine(self) -> bool:
        """Whether this is a GPU host without it; on the CPU the emulation of CUDA makes up for that."""
        return self.platform.name != "cpu" and self.transformer_engine is None

    @property
    def accelerator(self) -> str:
        """What torch calls the device that a model computes on here: ROCm's is "cuda" to it, too."""
        return "cpu" if self.platform.name == "cpu" else "cuda"

    def local_flags(self) -> list[str]:
        """Give what goes behind `flags` for Megatron Core's own layers, which Transformer Engine can't help."""
        if self.transformer_engine is None:
            return []
        return ["--transformer-impl=local", *(flag for library, flag in FUSIONS if library == "transformer_engine")]

    def flags(self) -> list[str]:
        """Give Megatron-LM's flags for this host: backend, layer implementation, precision, clipping, fusions."""
        layers = "transformer_engine" if self.transformer_engine else "local"
        absent = [flag for library, flag in FUSIONS if library not in self.libraries]
        return [*self.platform.flags, f"--transformer-impl={layers}", *absent]

    def why_not(self, ranks: int) -> str | None:
        """Say why a row of so many ranks doesn't fit, or give None if it does."""
        if ranks <= self.ranks:
            return None
        if self.platform.name == "cpu":
            return f"needs {ranks} ranks, and CPU rows have at most {self.ranks}"
        return f"needs {ranks} devices, and {self.ranks} x {self.device} found{_chosen(self.platform)}"


def find() -> str:
    """Name the platform of this host: "cpu", "cuda" or "rocm"."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def get(name: str | None = None) -> Host:
    """Look at this host. Call it where `cuda_emulation` is not installed: with it every host looks like CUDA.

    Args:
        name: The platform that must be here; None takes what is found. The CPU is everywhere.

    Raises:
        PlatformError: there is no such platform, or it is not on this host.
    """
    found = find()
    name = name or found
    if name not in PLATFORMS:
        raise PlatformError(f"{name!r} is no platform; choose one of {', '.join(PLATFORMS)}")
    if name not in ("cpu", found):
        raise PlatformError(
            f"asked for {name}, found {found}: {_absence(PLATFORMS[name])}; run on a host with such a device, or leave"
            " the name out to take what is there"
        )
    return _cpu() if name == "cpu" else _gpu(PLATFORMS[name])


def _cpu() -> Host:
    missing = dict.fromkeys(LIBRARIES, "made for GPUs")
    device = f"{platform.machine()}, {os.cpu_count()} cores"
    return Host(PLATFORMS["cpu"], CPU_RANKS, device, missing=missing, versions=_versions())


def _gpu(kind: Platform) -> Host:
    torch = _torch()
    libraries, missing = _try_libraries()
    toolkit = {kind.name: torch.version.hip or torch.version.cuda}
    known = {"transformer-engine": libraries["transformer_engine"]} if "transformer_engine" in libraries else {}
    return Host(
        kind,
        torch.cuda.device_count(),
        torch.cuda.get_device_name(0),
        libraries,
        missing,
        _versions() | toolkit | known,
    )


def _torch() -> Any:
    # nox asks from an interpreter that may have no torch.
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def _absence(kind: Platform) -> str:
    torch = _torch()
    if torch is None:
        return "torch can't be imported"
    if not (torch.version.hip if kind.name == "rocm" else torch.version.cuda):
        return f"torch {torch.__version__} is not built for it"
    return f"torch {torch.__version__} sees no device{_chosen(kind)}"


def _chosen(kind: Platform) -> str:
    """Say which visibility variables are set: one that hides devices is often forgotten."""
    given = [f"{name}={os.environ[name]}" for name in kind.visibility if name in os.environ]
    return f" ({', '.join(given)})" if given else ""


def _try_libraries() -> tuple[dict[str, str], dict[str, str]]:
    libraries, missing = {}, {}
    for name, module in LIBRARIES.items():
        # A library built for another torch or driver raises what it likes, and then is as good as absent.
        try:
            libraries[name] = _version(importlib.import_module(module), name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return libraries, missing


def _version(module: ModuleType, distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    if torch := _torch():
        versions["torch"] = torch.__version__
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def save_from_pageable_memory(writer: Any = None) -> None:
    """Have Megatron Core's checkpoint writer copy tensors to ordinary memory; for ROCm, before training starts.

    The writer copies to pinned memory and then starts processes that write (`FileSystemWriterAsync.preload_tensors`,
    `megatron/core/dist_checkpointing/strategies/filesystem_async.py`, core 0.17.1 to 0.19.2). Under HIP a process that
    is forked from one with pinned memory may crash, as slime found, which replaces the writer for that reason.

    Args:
        writer: The class; Megatron Core's if not given.
    """
    if writer is None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as writer
    preload: Callable[..., Any] = writer.preload_tensors

    def preload_tensors(write_buckets: list[Any], non_blocking: bool = False) -> list[Any]:
        return preload(write_buckets, non_blocking=False)

    writer.preload_tensors = staticmethod(preload_tensors)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description="Say what accelerator this machine has.")
    parser.add_argument("name", nargs="?", help=f"must be this one: {', '.join(PLATFORMS)}")
    parser.add_argument("--flags", action="store_true", help="print Megatron-LM's flags alone, in one line")
    options = parser.parse_args()
    try:
        host = get(options.name)
    except PlatformError as error:
        sys.exit(f"error: {error}")
    print(" ".join(host.flags()) if options.flags else json.dumps(asdict(host) | {"flags": host.flags()}, indent=2))


if __name__ == "__main__":
    main()
