# SPDX-License-Identifier: Apache-2.0
"""The stack of patches/ over the release of upstream that a build takes."""

import os
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fork import backend, stack
from fork.upstream import LATEST, obtain


FOR_NVIDIA_GPUS = {
    "fast-hadamard-transform",
    "flash-linear-attention",
    "flashinfer-cubin",
    "flashinfer-python",
    "nvidia-resiliency-ext",
}


@pytest.fixture(scope="module")
def upstream_wheel() -> Path:
    """Upstream's wheel: the one that the environment gives, or the one that the build has put into the cache."""
    given = os.environ.get(backend.WHEEL_VARIABLE)
    return obtain(LATEST, Path(given) if given else None)


@pytest.fixture(scope="module")
def patched(upstream_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The patched wheel."""
    with zipfile.ZipFile(backend.build(tmp_path_factory.mktemp("dist"), given=upstream_wheel)) as wheel:
        yield wheel


def asked_for(wheel: zipfile.ZipFile, extra: str) -> dict[str, Requirement]:
    """The requirements that installing the wheel with `extra` adds to the base; the base's own for an empty one."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist: ")]
    asked = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]

    def holds(each: Requirement, value: str) -> bool:
        return each.marker is None or each.marker.evaluate({"extra": value})

    return {each.name: each for each in asked if holds(each, extra) and (not extra or not holds(each, ""))}


def test_second_application_changes_nothing(upstream_wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(upstream_wheel) as wheel:
        wheel.extractall(tmp_path)
    changes = stack.load()
    stack.apply(changes, tmp_path, pristine=True)
    once = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stack.apply(changes, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == once


def test_base_asks_for_nothing_that_only_nvidia_gpus_need(patched: zipfile.ZipFile):
    base = asked_for(patched, "")
    assert not FOR_NVIDIA_GPUS & set(base)
    assert base["megatron-core"].extras == {"mlm"}
    assert not base["megatron-core"].specifier.contains("0.20.0")


def test_extra_cuda_gives_what_upstreams_base_did(patched: zipfile.ZipFile, upstream_wheel: Path):
    with zipfile.ZipFile(upstream_wheel) as wheel:
        upstreams = asked_for(wheel, "")
    cuda = asked_for(patched, "cuda")
    assert set(cuda) == FOR_NVIDIA_GPUS | {"megatron-core"}
    assert cuda["megatron-core"].extras == {"dev"}
    together = {**asked_for(patched, ""), **cuda}
    assert set(upstreams) <= set(together)
    for name, requirement in upstreams.items():
        if name != "megatron-core":
            assert requirement.specifier == together[name].specifier, name


def test_wheel_loses_no_file_of_upstreams(patched: zipfile.ZipFile, upstream_wheel: Path):
    with zipfile.ZipFile(upstream_wheel) as wheel:
        upstreams = {name for name in wheel.namelist() if name.startswith("megatron/")}
    ours = {name for name in patched.namelist() if name.startswith("megatron/")}
    modules = {f"megatron/bridge/{module}" for change in stack.load() for module in change.modules}
    assert ours - upstreams == modules
    assert upstreams <= ours
