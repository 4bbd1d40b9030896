# SPDX-License-Identifier: Apache-2.0
"""Every kind of host, faked: what is found on it, and which of Megatron-LM's flags follow."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import platforms
import pytest


class Machine:
    """Fakes torch and the libraries that can be imported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modules: dict[str, object] = {}
        monkeypatch.setattr(importlib, "import_module", self._import)
        monkeypatch.setattr(platforms.metadata, "version", self._no_package)
        for kind in platforms.PLATFORMS.values():
            for name in kind.visibility:
                monkeypatch.delenv(name, raising=False)

    def torch(self, devices: int, *, hip: str | None = None, cuda: str | None = None) -> "Machine":
        self.modules["torch"] = SimpleNamespace(
            __version__="2.11.0",
            version=SimpleNamespace(hip=hip, cuda=cuda),
            cuda=SimpleNamespace(
                is_available=lambda: devices > 0,
                device_count=lambda: devices,
                get_device_name=lambda index: "a device",
            ),
        )
        return self

    def library(self, module: str, found: object) -> "Machine":
        self.modules[module] = found
        return self

    def _import(self, name: str) -> object:
        found = self.modules.get(name, ImportError(f"No module named {name!r}"))
        if isinstance(found, Exception):
            raise found
        return found

    @staticmethod
    def _no_package(name: str) -> str:
        raise platforms.metadata.PackageNotFoundError(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


CUDA, ROCM = {"cuda": "13.0"}, {"hip": "7.1.0"}
TE = SimpleNamespace(__version__="2.8.0")


@pytest.mark.parametrize(
    ("devices", "build", "name", "library", "ranks"),
    [
        (0, {}, "cpu", "gloo", platforms.CPU_RANKS),
        (0, CUDA, "cpu", "gloo", platforms.CPU_RANKS),
        (2, CUDA, "cuda", "NCCL", 2),
        (8, ROCM, "rocm", "RCCL", 8),
    ],
)
def test_find(machine: Machine, devices: int, build: dict, name: str, library: str, ranks: int) -> None:
    machine.torch(devices, **build)
    host = platforms.get()
    assert (host.platform.name, host.platform.library, host.ranks) == (name, library, ranks)
    assert host.platform.backend == ("gloo" if name == "cpu" else "nccl")


def test_find_without_torch(machine: Machine) -> None:
    assert platforms.get().platform.name == "cpu"


def test_cpu_flags(machine: Machine) -> None:
    assert set(machine.torch(0) and platforms.get().flags()) == {
        "--distributed-backend=gloo",
        "--transformer-impl=local",
        "--clip-grad=1",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--no-masked-softmax-fusion",
        "--no-bias-gelu-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-gradient-accumulation-fusion",
    }


@pytest.mark.parametrize("build", [CUDA, ROCM])
def test_gpu_flags_without_transformer_engine(machine: Machine, build: dict) -> None:
    assert machine.torch(1, **build) and platforms.get().flags() == [
        "--distributed-backend=nccl",
        "--bf16",
        "--clip-grad=1",
        "--transformer-impl=local",
        "--no-persist-layer-norm",
        "--no-rope-fusion",
        "--no-masked-softmax-fusion",
        "--no-gradient-accumulation-fusion",
    ]


@pytest.mark.parametrize("build", [CUDA, ROCM])
def test_gpu_flags_with_transformer_engine(machine: Machine, build: dict) -> None:
    machine.torch(1, **build).library("transformer_engine.pytorch", TE)
    machine.library("scaled_upper_triang_masked_softmax_cuda", SimpleNamespace())
    host = platforms.get()
    assert host.transformer_engine == host.versions["transformer-engine"] == "2.8.0"
    assert host.flags()[-2:] == ["--transformer-impl=transformer_engine", "--no-gradient-accumulation-fusion"]
    machine.library("fused_weight_gradient_mlp_cuda", SimpleNamespace())
    assert platforms.get().flags()[-1] == "--transformer-impl=transformer_engine"


def test_broken_transformer_engine_counts_as_absent_and_says_why(machine: Machine) -> None:
    machine.torch(1, **CUDA).library("transformer_engine.pytorch", OSError("undefined symbol: x\nand more"))
    host = platforms.get()
    assert host.transformer_engine is None
    assert host.missing["transformer_engine"] == "OSError: undefined symbol: x"
    assert "--transformer-impl=local" in host.flags()


def test_cpu_can_be_forced_beside_a_gpu_and_hides_it(machine: Machine) -> None:
    machine.torch(2, **CUDA).library("transformer_engine.pytorch", TE)
    host = platforms.get("cpu")
    assert host.platform.environment == {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    assert "--transformer-impl=local" in host.flags()


@pytest.mark.parametrize(
    ("devices", "build", "name", "message"),
    [
        (0, {}, "cuda", "asked for cuda, found cpu: torch 2.11.0 is built without it"),
        (0, ROCM, "rocm", "asked for rocm, found cpu: torch 2.11.0 sees no device;"),
        (1, CUDA, "rocm", "asked for rocm, found cuda: torch 2.11.0 is built without it"),
        (1, ROCM, "cuda", "asked for cuda, found rocm: torch 2.11.0 is built without it"),
        (1, CUDA, "tpu", "found the platform 'tpu', expected one of cpu, cuda, rocm"),
    ],
)
def test_absent_platform_is_an_error(machine: Machine, devices: int, build: dict, name: str, message: str) -> None:
    machine.torch(devices, **build)
    with pytest.raises(platforms.PlatformError) as error:
        platforms.get(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_absence_names_the_variables_that_hide_devices(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    machine.torch(0, **ROCM)
    with pytest.raises(platforms.PlatformError, match=r"\(HIP_VISIBLE_DEVICES=-1, ROCR_VISIBLE_DEVICES=\)"):
        platforms.get("rocm")


def test_why_not(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine.torch(0) and platforms.get()
    assert host.why_not(4) is None
    assert host.why_not(8) == "needs 8 ranks, and CPU rows have at most 4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    host = machine.torch(1, **CUDA) and platforms.get()
    assert host.why_not(1) is None
    assert host.why_not(2) == "needs 2 devices, and 1 x a device found (CUDA_VISIBLE_DEVICES=3)"


def test_versions(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.torch(1, **ROCM)
    assert platforms.get().versions == {
        "python": platforms.platform.python_version(),
        "torch": "2.11.0",
        "rocm": "7.1.0",
    }
    monkeypatch.setattr(platforms.metadata, "version", lambda name: {"megatron-core": "0.19.2"}.get(name, "1"))
    assert platforms.get().versions["megatron-core"] == "0.19.2"


@pytest.mark.parametrize("call", [lambda w: w.run(True), lambda w: w.run(), lambda w: w.run(non_blocking=True)])
def test_rocm_writer_never_pins(call: object) -> None:
    class Writer:
        @staticmethod
        def preload_tensors(write_buckets: list, non_blocking: bool = True) -> tuple[list, bool]:
            return write_buckets, non_blocking

        def run(self, *given: bool, **named: bool) -> tuple[list, bool]:
            return self.preload_tensors(["bucket"], *given, **named)

    assert call(Writer()) == (["bucket"], True)
    platforms.save_from_pageable_memory(Writer)
    assert call(Writer()) == (["bucket"], False)


def ask(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, platforms.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_command_line() -> None:
    found = json.loads(ask().stdout)
    assert found["platform"]["name"] == "cpu"
    assert ask("--flags").stdout.split() == ask("cpu", "--flags").stdout.split() == found["flags"]
    assert "--distributed-backend=gloo" in found["flags"]
    refused = ask("rocm")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: asked for rocm, found cpu:")
