# SPDX-License-Identifier: Apache-2.0
"""A payload folder is examined: whole, damaged, or of another format."""

import os
from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.payload import examine_payload


@pytest.mark.parametrize(("core", "written_by"), [("0.18", "0.18 or earlier"), ("0.19", "0.19 or later")])
def test_a_whole_payload(core: str, written_by: str, build, tmp_path: Path):
    found = examine_payload(build(tmp_path / "c", core=core) / "release")
    assert (found.format, found.core, found.damage, found.discord) == ("torch_dist", written_by, [], [])
    assert (found.args.num_layers, found.missing_args, found.contradictions) == (2, [], [])
    assert (found.parameters, found.dtypes, found.parallelism) == (1280, ["float32"], {"TP": 1, "PP": 1})
    assert (found.iteration, found.version, found.has_optimizer) == (0, 3.0, False)


def test_damage_is_named(build, tmp_path: Path):
    folder = build(tmp_path / "c") / "release"
    os.truncate(folder / "__0_0.distcp", 10)
    assert examine_payload(folder).damage[0].startswith("__0_0.distcp is short: 10 of ")
    (folder / ".metadata").unlink()
    assert examine_payload(folder).damage == [".metadata is missing: without it no weight can be found"]
