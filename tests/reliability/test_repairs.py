# SPDX-License-Identifier: Apache-2.0
"""Repairs of what `import_ckpt` wrote before release checkpoints: killed, on a full disk, or without permission.

tests/unit/release_checkpoint/test_states.py has every state, and each change to it. Here files, args and imports are
real.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import KILLED, PAYLOAD, TRACKER, AutoBridge, Child, digest, names, run, weights
from click.testing import CliRunner
from kills import killed_at_change
from test_faults import MS_RDONLY, MS_REMOUNT, in_fork, in_namespace, models, mount, used_kib  # noqa: F401 - a fixture

from megatron.bridge.cli import main
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import resolve_checkpoint
from megatron.bridge.repair import repair
from megatron.bridge.repair.problems import problems


WHOLE = {"release", TRACKER}


@pytest.fixture(scope="module")
def before(models, tmp_path_factory):  # noqa: F811
    """What `import_ckpt` wrote of the newer model."""
    folder = tmp_path_factory.mktemp("before") / "before"
    assert "error" not in run(partial(AutoBridge.import_ckpt, models / "hf-new", folder, release=False))
    assert "iter_0000000" in names(folder)
    return folder


def repaired(out: Path) -> None:
    repair.run(repair.plan(out))


def said(out: Path) -> str:
    """What the command says; its error must be one line."""
    result = CliRunner().invoke(main, ["repair", str(out)])
    assert result.stderr.count("\n") == bool(result.exit_code), result.output
    return result.stderr


def assert_repaired(models: Path, out: Path) -> None:  # noqa: F811
    assert names(out) == WHOLE
    assert names(out / "release") >= PAYLOAD - {"hf"}
    assert digest(out) == digest(models / "new")


def test_a_kill_at_each_change_and_an_import_after_it(models, before, tmp_path, record_property):  # noqa: F811
    whole = {name: tensor.tolist() for name, tensor in weights(before / "iter_0000000").items()}
    for number in range(100):
        out = shutil.copytree(before, tmp_path / str(number))
        seen = run(partial(killed_at_change, number, out, partial(repaired, out)))
        if seen != KILLED:
            assert "error" not in seen, seen
            break
        if (out / TRACKER).exists():
            found = weights(Path(resolve_checkpoint(out)))
            assert {name: tensor.tolist() for name, tensor in found.items()} == whole
        again = run(partial(AutoBridge.import_ckpt, models / "hf-new", out))
        assert "error" not in again, again
        # An older iteration 0 stays, as after any import.
        assert names(out) - {"iter_0000000"} == WHOLE
        assert names(out / "release") == PAYLOAD
        assert digest(out) == digest(models / "new")
        shutil.rmtree(out)
    assert_repaired(models, out)
    assert number > 8
    record_property("count of repairs killed, and an import after each", number)


def test_a_release_without_common_pt_gets_it_killed_at_each_change(models, tmp_path, record_property):  # noqa: F811
    """As the wheel release.1 wrote it: what Megatron Core reads stays the same at every moment."""
    written = torch.load(models / "new/release/common.pt", weights_only=True)
    for number in range(100):
        out = shutil.copytree(models / "new", tmp_path / str(number))
        (out / "release/common.pt").unlink()
        seen = run(partial(killed_at_change, number, out, partial(repaired, out)))
        assert digest(out) == digest(models / "new")
        if seen != KILLED:
            assert "error" not in seen, seen
            break
        repaired(out)
        assert_repaired(models, out)
    assert problems(examine(out)) == []
    assert torch.load(out / "release/common.pt", weights_only=True) == written
    assert number > 2
    record_property("count of repairs of a release without common.pt, killed", number)


def on_small_disk(models: Path, before: Path, folder: Path, free_kib: int) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    out = shutil.copytree(before, disk / "out")
    tree = names(out)
    # tmpfs takes 0 for no limit at all.
    mount(disk, max(used_kib(disk) + free_kib, 4), MS_REMOUNT)
    error = said(out)
    assert names(out) == tree
    mount(disk, 1 << 20, MS_REMOUNT)
    repaired(out)
    assert_repaired(models, out)
    return error


@pytest.mark.parametrize("free_kib", [0, 4])
def test_a_full_disk(models, before, tmp_path, free_kib, record_property):  # noqa: F811
    error = in_fork(partial(on_small_disk, models, before, tmp_path / "disk", free_kib))
    assert error.endswith("No space left on device. Free space there, and run the command again.\n")
    record_property("count of repairs on a full disk", 1)


def on_read_only_disk(models: Path, before: Path, folder: Path) -> str:  # noqa: F811
    in_namespace()
    disk = mount(folder, 1 << 20)
    out = shutil.copytree(before, disk / "out")
    mount(disk, 1 << 20, MS_REMOUNT | MS_RDONLY)
    error = said(out)
    mount(disk, 1 << 20, MS_REMOUNT)
    assert names(out) == names(before)
    repaired(out)
    assert_repaired(models, out)
    return error


def test_a_read_only_disk(models, before, tmp_path, record_property):  # noqa: F811
    error = in_fork(partial(on_read_only_disk, models, before, tmp_path / "disk"))
    assert "Read-only file system. Mount it for writing, or pass a different path." in error
    record_property("count of repairs on a read-only disk", 1)


def without_permission(out: Path) -> str:
    in_namespace(mapped=False)
    return said(out)


def test_a_checkpoint_that_belongs_to_somebody_else(before, tmp_path, record_property):
    out = shutil.copytree(before, tmp_path / "out")
    out.chmod(0o500)
    try:
        error = in_fork(partial(without_permission, out))
    finally:
        out.chmod(0o700)
    assert "Permission denied. Change its permissions, or pass a different path." in error
    assert names(out) == names(before)
    record_property("count of repairs of what belongs to somebody else", 1)


def test_two_repairs_at_once(models, before, tmp_path, record_property):  # noqa: F811
    """Ten times: one is done, and the other finds nothing to do or says who was first."""
    refused, rounds = 0, 10
    for number in range(rounds):
        out = shutil.copytree(before, tmp_path / str(number))
        seen = [child.answer() for child in [Child(partial(repaired, out)) for _ in range(2)]]
        errors = [each["message"] for each in seen if "error" in each]
        assert len(errors) < 2, seen
        assert all("is running: wait for it" in each or "has changed since" in each for each in errors), errors
        refused += len(errors)
        assert_repaired(models, out)
    record_property("count of repairs beside another one, done", 2 * rounds - refused)
    record_property("count of repairs beside another one, refused", refused)
