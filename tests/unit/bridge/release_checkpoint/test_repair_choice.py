# SPDX-License-Identifier: Apache-2.0
"""A repair chooses the payload that is whole, and touches no training."""

import shutil
from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.repair.choice import choose
from megatron.bridge.repair.steps import Refused, completion, free_name, removal, replace


def test_the_payload_that_is_whole_is_chosen(build, tmp_path: Path):
    root = build(tmp_path / "c", "iter_0000000", "0")
    shutil.copytree(root / "iter_0000000", root / "release")
    (root / "release/__0_0.distcp").unlink()
    payload, index = choose(examine(root))
    assert (payload.path.name, index) == ("iter_0000000", None)


def test_metadata_that_was_left_behind_completes_a_payload(build, tmp_path: Path):
    root = build(tmp_path / "c")
    (root / "iter_0000000").mkdir()
    (root / "release/.metadata").rename(root / "iter_0000000/.metadata")
    payload, index = choose(examine(root))
    assert (payload.path.name, payload.damage, index) == ("release", [], root / "iter_0000000/.metadata")
    completion(payload.path / ".metadata", index).do()
    assert examine(root).payload.damage == [] and not index.exists()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"folder": "iter_0000005", "tracker": "5", "iteration": 5}, "holds training iteration 5"),
        ({"optimizer": True}, "holds optimizer state"),
        ({"other_args": {"consumed_train_samples": 7}}, "was trained up to 7 samples"),
        ({"folder": None, "tracker": None}, "holds no checkpoint"),
    ],
)
def test_a_training_and_nothing_at_all_are_refused(made: dict, why: str, build, tmp_path: Path):
    with pytest.raises(Refused, match=why):
        choose(examine(build(tmp_path / "c", **made)))


def test_files_are_replaced_and_removed_whole(tmp_path: Path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "file.incomplete").symlink_to(tmp_path / "kept")
    replace(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and (tmp_path / "kept").read_text() == "kept"
    assert free_name(tmp_path, "file") == "file.1"
    removal(tmp_path / "file", "it is old").do()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
