# SPDX-License-Identifier: Apache-2.0
"""The common state of a payload becomes that of a release, in both forms."""

from pathlib import Path

import pytest
import torch

from megatron.bridge.release_checkpoint.payload import examine_payload
from megatron.bridge.repair import state as repair_state
from megatron.bridge.repair.state import steps_of_state, truth
from megatron.bridge.repair.steps import NeedsModel, Refused


@pytest.fixture
def derived(monkeypatch, release_args):
    monkeypatch.setattr(repair_state, "_derive_args", lambda payload, hf_model, trust: release_args)


def repaired(folder: Path) -> list[str]:
    """Do the steps, and return what they were."""
    steps = steps_of_state(truth(examine_payload(folder)), None, False)
    for step in steps:
        step.do()
    return [step.what.partition(",")[0] for step in steps]


@pytest.mark.parametrize("core", ["0.18", "0.19"])
def test_args_are_derived_and_those_that_are_there_stay(core: str, build, tmp_path: Path, derived):
    folder = build(tmp_path / "c", args={"num_layers": 2, "own": "kept"}, core=core, iteration=0) / "release"
    assert repaired(folder)[0] == "write Megatron-LM's args"
    found = examine_payload(folder)
    assert (found.missing_args, found.discord, found.args.own) == ([], [], "kept")
    assert repaired(folder) == []


def test_one_form_is_written_from_the_other(build, tmp_path: Path):
    folder = build(tmp_path / "c", common_pt=False) / "release"
    assert repaired(folder) == ["write common.pt"]
    torch.save({"iteration": 0}, folder / "common.pt")
    (folder / "run_config.yaml").unlink()
    assert repaired(folder) == ["write common.pt"]
    assert examine_payload(folder).discord == []


def test_nothing_to_take_the_args_from_and_two_truths_are_refused(build, tmp_path: Path):
    with pytest.raises(NeedsModel, match="pass the model that it was imported from with --hf-model"):
        repaired(build(tmp_path / "a", args=None, run_config=False) / "release")
    other = {"common": {"content_metadata": {"a": 2}}}
    with pytest.raises(Refused, match="differ in content_metadata"):
        repaired(build(tmp_path / "b", in_common_pt=other) / "release")
