# SPDX-License-Identifier: Apache-2.0
"""What lies at a path."""

from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.files import HOST


@pytest.mark.parametrize(
    ("made", "layout"),
    [
        ({}, "release"),
        ({"core": "0.18"}, "release"),
        ({"folder": "iter_0000000", "tracker": "0"}, "iter"),
        ({"folder": "iter_0000000", "tracker": "release"}, None),
        ({"folder": "iter_0000005", "tracker": "5", "iteration": 5, "optimizer": True}, "training"),
    ],
)
def test_a_root_has_a_layout(made: dict, layout: str | None, build, tmp_path: Path):
    found = examine(build(tmp_path / "c", **made))
    assert (found.kind, found.layout) == ("root", layout)


def test_a_payload_folder_and_a_link_to_it_stand_for_their_root(build, tmp_path: Path):
    root = build(tmp_path / "c")
    (root / "iter_0000000").symlink_to("release")
    for name in ("release", "iter_0000000"):
        found = examine(root / name)
        assert (found.kind, found.root, found.payload.path) == ("payload", root, root / "release")
    assert (found.folders, found.link, found.misled) == (["release"], "release", None)


def test_what_is_no_checkpoint(build, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    kinds = {name: examine(tmp_path / name).kind for name in ("missing", "file", "empty")}
    assert kinds == {name: name for name in kinds}


def test_leftovers_are_named_and_used_if_nothing_else_is_there(build, tmp_path: Path):
    killed = f"release.incomplete.{HOST}-1-01234567"
    for number, folder in enumerate(("release.replaced", f"{killed}/release.replaced")):
        found = examine(root := build(tmp_path / str(number), folder, None, leftovers=(killed,)))
        assert (found.leftovers, found.busy) == ([killed, *([] if number else [folder])], False)
        assert found.payload.path == root / folder
