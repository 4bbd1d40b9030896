# SPDX-License-Identifier: Apache-2.0
"""The stack of changes/ over every release of upstream that a build takes."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from fork import backend, stack, travel
from fork.errors import UpstreamError
from fork.imports import missing
from fork.upstream import LATEST, RELEASES, Upstream, obtain


FOR_NVIDIA_GPUS = {
    "causal-conv1d",
    "fast-hadamard-transform",
    "flash-linear-attention",
    "flashinfer-cubin",
    "flashinfer-python",
    "mamba-ssm",
    "nvidia-resiliency-ext",
    "transformer-engine",
}


@pytest.fixture(scope="module", params=RELEASES.values(), ids=RELEASES)
def upstream(request: pytest.FixtureRequest) -> Upstream:
    """A release of upstream."""
    return request.param


def _given() -> Path | None:
    """The wheel of the latest release that the environment gives."""
    given = os.environ.get(backend.WHEEL_VARIABLE)
    return Path(given) if given else None


@pytest.fixture(scope="module")
def upstream_wheel(upstream: Upstream) -> Path:
    """Upstream's wheel: the one that the environment gives, or one in the cache, where it is put if need be."""
    given = _given()
    if upstream is LATEST:
        return obtain(upstream, given)
    try:
        return obtain(upstream)
    except UpstreamError as error:
        if given:
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def patched(
    upstream: Upstream, upstream_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[zipfile.ZipFile]:
    """The patched wheel."""
    with zipfile.ZipFile(backend.build(tmp_path_factory.mktemp("dist"), upstream, upstream_wheel)) as wheel:
        yield wheel


def asked_for(wheel: zipfile.ZipFile, extra: str) -> dict[str, Requirement]:
    """The requirements that installing the wheel with `extra` adds to the base; the base's own for an empty one."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist: ")]
    asked = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]

    def holds(each: Requirement, value: str) -> bool:
        return each.marker is None or each.marker.evaluate({"extra": value})

    return {each.name: each for each in asked if holds(each, extra) and (not extra or not holds(each, ""))}


def test_edits_have_names_that_one_can_read():
    for change in stack.load():
        for file in change.edits:
            for edit in file.edits:
                assert not re.search(r" at 0x|DoNotCare|MatchIfTrue", edit.name), edit.name


def test_second_application_changes_nothing(patched: zipfile.ZipFile, tmp_path: Path):
    patched.extractall(tmp_path)
    once = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stack.apply(stack.load(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == once


def test_change_imports_nothing_of_a_later_one(tmp_path: Path):
    with zipfile.ZipFile(obtain(LATEST, _given())) as wheel:
        wheel.extractall(tmp_path)
    for change in stack.load():
        paths = [stack.find_package(tmp_path) / path for path in stack.apply([change], tmp_path)]
        assert missing(paths, [tmp_path], travel.IMPORTED) == [], change.name


def test_base_asks_for_nothing_that_only_nvidia_gpus_need(patched: zipfile.ZipFile, upstream: Upstream):
    base = asked_for(patched, "")
    assert not FOR_NVIDIA_GPUS & set(base)
    assert base["megatron-core"].extras == {"mlm"}
    major, minor, _ = Version(upstream.megatron_core).release
    others = {each.megatron_core for each in RELEASES.values()} - {upstream.megatron_core} | {f"{major}.{minor + 1}.0"}
    assert base["megatron-core"].specifier.contains(upstream.megatron_core)
    assert not any(base["megatron-core"].specifier.contains(other) for other in others)
    assert base["transformers"].specifier.contains(upstream.transformers)


def test_extra_cuda_gives_what_upstreams_base_did(patched: zipfile.ZipFile, upstream_wheel: Path):
    with zipfile.ZipFile(upstream_wheel) as wheel:
        upstreams = asked_for(wheel, "")
    cuda = asked_for(patched, "cuda")
    assert set(cuda) == FOR_NVIDIA_GPUS & set(upstreams) | {"megatron-core"}
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
    modules = {os.path.normpath(f"megatron/bridge/{module}") for change in stack.load() for module in change.modules}
    assert ours - upstreams == modules
    assert upstreams <= ours


def test_no_version_lacks_a_name_that_an_edit_uses(patched: zipfile.ZipFile, tmp_path: Path):
    """An edit can find its place in a version that has no variable or import of a name which the edit uses."""
    patched.extractall(tmp_path)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--output-format=concise"]
    checked = subprocess.run([*command, tmp_path / "megatron"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
