# SPDX-License-Identifier: Apache-2.0
"""Imports and exports that are killed: what is there afterwards is what was there, what is new, or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streaming", "link", "kills"),
    [(True, False, 200), (False, True, 140)],
    ids=["streaming", "in memory, with a link iter_0000000"],
)
def test_kills(streaming, link, kills, record_property):
    options = json.dumps({"streaming": streaming, "link_iter_0": link})
    how = "streaming" if streaming else "in memory"
    assert_whole_or_none(f"imports killed, {how}", kills, [f"--options={options}"], record_property)


@pytest.mark.slow
def test_kills_of_exports(record_property):
    assert_whole_or_none("exports killed", 140, ["--export"], record_property)


def assert_whole_or_none(what, kills, options, record_property):
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), f"--kills={kills}", *options]
    if seed := os.environ.get("KILLS_SEED"):
        command.append(f"--seed={seed}")
    # A process of its own: the tests before this one have started threads, which a fork would lose.
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr[-3000:]}"
    # The seed, for a failure.
    print(run.stdout)
    counts = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [(each["over"], each["kills"]) for each in counts] == [(False, kills // 2), (True, kills // 2)]
    assert counts[1]["no checkpoint"] == 0
    for when in ("while the payload was written", "between the renames"):
        assert all(each[when] for each in counts), when
    for each in counts:
        record_property(f"count of {what}, {'over an older one' if each['over'] else 'into nothing'}", each["kills"])
