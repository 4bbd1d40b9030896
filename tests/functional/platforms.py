# SPDX-License-Identifier: Apache-2.0
"""Find this host's accelerator, and the flags that Megatron-LM needs for it.

    python tests/functional/platforms.py           # print what this machine has, as JSON
    python tests/functional/platforms.py cuda      # the same, or an error that says why CUDA is not available
    python tests/functional/platforms.py --flags   # print the flags of Megatron-LM for this host

`PLATFORMS` has a row for each platform. `FUSIONS` has a row for each fusion that needs a library.
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
    """This host doesn't have the requested platform."""


@dataclass(frozen=True)
class Platform:
    """What all hosts of one kind have in common.

    Attributes:
        name: The name in the session and the report.
        backend: Torch's name of the collectives. Torch calls RCCL "nccl".
        library: The library of the collectives.
        flags: Megatron-LM's flags that don't depend on the host's libraries.
        visibility: The variables that choose devices, in the order in which torch reads them.
        environment: Variables that a step needs there.
    """

    name: str
    backend: str
    library: str
    flags: tuple[str, ...]
    visibility: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


_GPU_FLAGS = ("--distributed-backend=nccl", "--bf16", "--clip-grad=1")

# The CPU uses float32, to compare losses with Hugging Face's to four digits. The emulation can do bf16 too.
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
            # HIP, and torch (`_parse_visible_devices`).
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

# Ranks on the CPU are processes that share its cores. Four cover every kind of parallelism.
CPU_RANKS = 4

# Modules whose import shows that a library works. AMD's Transformer Engine has the same name as NVIDIA's. Apex is
# found by its extensions, because a build without them can be imported too.
LIBRARIES = {
    "transformer_engine": "transformer_engine.pytorch",
    "apex softmax": "scaled_upper_triang_masked_softmax_cuda",
    "apex wgrad": "fused_weight_gradient_mlp_cuda",
}

# Flags that a host without the library needs, and the code that requires them (core 0.19.2).
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
    """A host, as it was found.

    Attributes:
        platform: The kind of host.
        ranks: The most ranks that a row may have: devices, or processes on the CPU.
        device: The device's name.
        libraries: The versions of those `LIBRARIES` that can be imported.
        missing: Why each of the others can't.
        versions: The versions for the report.
    """

    platform: Platform
    ranks: int
    device: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def transformer_engine(self) -> str | None:
        """The version of NVIDIA's or AMD's Transformer Engine, if it can be used."""
        return self.libraries.get("transformer_engine")

    @property
    def lacks_transformer_engine(self) -> bool:
        """Whether this is a GPU host without it. The CPU doesn't need it, because it emulates CUDA."""
        return self.platform.name != "cpu" and self.transformer_engine is None

    @property
    def accelerator(self) -> str:
        """Torch's name of the device that a model computes on. Torch calls ROCm "cuda" too."""
        return "cpu" if self.platform.name == "cpu" else "cuda"

    def local_flags(self) -> list[str]:
        """Return the flags to append to `flags` for Megatron Core's own layers, if Transformer Engine is there."""
        if self.transformer_engine is None:
            return []
        return ["--transformer-impl=local", *(flag for library, flag in FUSIONS if library == "transformer_engine")]

    def flags(self) -> list[str]:
        """Return Megatron-LM's flags for this host: backend, layer implementation, precision, clipping, fusions."""
        layers = "transformer_engine" if self.transformer_engine else "local"
        absent = [flag for library, flag in FUSIONS if library not in self.libraries]
        return [*self.platform.flags, f"--transformer-impl={layers}", *absent]

    def why_not(self, ranks: int) -> str | None:
        """Return why a row with this many ranks doesn't fit, or None if it does."""
        if ranks <= self.ranks:
            return None
        if self.platform.name == "cpu":
            return f"needs {ranks} ranks, and CPU rows have at most {self.ranks}"
        return f"needs {ranks} devices, and {self.ranks} x {self.device} found{_chosen(self.platform)}"


def find() -> str:
    """Return the platform of this host: "cpu", "cuda", or "rocm"."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def get(name: str | None = None) -> Host:
    """Inspect this host. Call it before `cuda_emulation` is installed, which makes every host look like CUDA.

    Args:
        name: The platform that this host must have. Default: the one that is found. Every host has "cpu".

    Raises:
        PlatformError: There is no such platform, or this host doesn't have it.
    """
    found = find()
    name = name or found
    if name not in PLATFORMS:
        raise PlatformError(f"found the platform {name!r}, expected one of {', '.join(PLATFORMS)}")
    if name not in ("cpu", found):
        raise PlatformError(
            f"asked for {name}, found {found}: {_absence(PLATFORMS[name])}; run on a host with such a device, or leave"
            " out the name to use what is there"
        )
    return _cpu() if name == "cpu" else _gpu(PLATFORMS[name])


def _cpu() -> Host:
    missing = dict.fromkeys(LIBRARIES, "needs a GPU")
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
    # The interpreter of nox may have no torch.
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def _absence(kind: Platform) -> str:
    torch = _torch()
    if torch is None:
        return "torch can't be imported"
    if not (torch.version.hip if kind.name == "rocm" else torch.version.cuda):
        return f"torch {torch.__version__} is built without it"
    return f"torch {torch.__version__} sees no device{_chosen(kind)}"


def _chosen(kind: Platform) -> str:
    """Return the visibility variables that are set, because people forget a variable that hides devices."""
    given = [f"{name}={os.environ[name]}" for name in kind.visibility if name in os.environ]
    return f" ({', '.join(given)})" if given else ""


def _try_libraries() -> tuple[dict[str, str], dict[str, str]]:
    libraries, missing = {}, {}
    for name, module in LIBRARIES.items():
        # A library that was built for another torch or driver can raise any error. It counts as absent then.
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
    """Make Megatron Core's checkpoint writer copy tensors to pageable memory. On ROCm, call it before the training.

    The writer copies to pinned memory and then forks processes that write (`FileSystemWriterAsync.preload_tensors`,
    `megatron/core/dist_checkpointing/strategies/filesystem_async.py`, core 0.17.1 to 0.19.2). Under HIP, a process
    that is forked from one with pinned memory may crash. slime replaces the writer for this reason.

    Args:
        writer: The writer's class. Default: Megatron Core's.
    """
    if writer is None:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as writer
    preload: Callable[..., Any] = writer.preload_tensors

    def preload_tensors(write_buckets: list[Any], non_blocking: bool = False) -> list[Any]:
        return preload(write_buckets, non_blocking=False)

    writer.preload_tensors = staticmethod(preload_tensors)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description="Print which accelerator this machine has.")
    parser.add_argument("name", nargs="?", help=f"require this platform: {', '.join(PLATFORMS)}")
    parser.add_argument("--flags", action="store_true", help="print only Megatron-LM's flags, in one line")
    options = parser.parse_args()
    try:
        host = get(options.name)
    except PlatformError as error:
        sys.exit(f"error: {error}")
    print(" ".join(host.flags()) if options.flags else json.dumps(asdict(host) | {"flags": host.flags()}, indent=2))


if __name__ == "__main__":
    main()
