# SPDX-License-Identifier: Apache-2.0
"""The table of releases and its rows."""

import pickle
from pathlib import Path

import check
import table


VERSIONS = {"megatron-core": "0.9", "transformers": "5", "torch": "2"}
RESULTS = {"imports": "yes", "writes_release": "fails: OSError: a | b"}


def row(release: str) -> dict:
    return {"date": "2026-11-22", "versions": {"megatron-bridge": release, **VERSIONS}, "results": RESULTS}


def test_rows_are_in_the_order_of_versions_and_of_capabilities():
    lines = table.table([row("0.10.0"), row("0.9.1")]).splitlines()
    cells = [line.split(" | ") for line in lines[2:]]
    assert [(line[0], line[4]) for line in cells] == [
        (version, capability) for version in ("| 0.9.1", "| 0.10.0") for capability in table.CAPABILITIES
    ]


def test_stages_that_were_not_reached_are_said_and_bars_are_escaped():
    lines = table.table([row("0.9.1")]).splitlines()
    assert (
        "| 0.9.1 | 0.9 | 5 | 2 | release checkpoint | layout: fails: OSError: a \\| b; loads: not reached; "
        "trains: not reached | 2026-11-22 |"
    ) in lines
    assert "| 0.9.1 | 0.9 | 5 | 2 | code in checkpoints | refuses: not reached | 2026-11-22 |" in lines


def test_releases_that_were_not_tried_again_stay():
    before = table.table([row("0.8.0"), row("0.9.1")])
    kept = table.lines_of(before.strip())
    tried = row("0.9.1") | {"date": "2027-01-01"}
    after = table.table([tried], kept)
    assert after == table.table([row("0.8.0"), tried])
    assert table.lines_of("| another | table |\n| --- | --- |\n| 0.8.0 | x |\n") == []
    assert table.lines_of("") == []


def test_payload_would_run(tmp_path: Path):
    pickle.loads(pickle.dumps(check.Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


def test_every_stage_has_its_place():
    stages = [stage for stages in table.CAPABILITIES.values() for stage in stages]
    assert sorted(stages) == sorted(stage.__name__ for stage in check.STAGES)
