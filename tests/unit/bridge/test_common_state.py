# SPDX-License-Identifier: Apache-2.0
"""Both forms of the common state hold the same."""

from argparse import Namespace

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron.bridge.training.common_state import write_common_pt


STATE = {"args": Namespace(num_layers=2), "iteration": 0, "checkpoint_version": 3.0}


@pytest.mark.parametrize("has_file", [False, True])
def test_the_file_is_written_from_the_entry_unless_it_is_there(tmp_path, monkeypatch, has_file):
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda path: STATE)
    if has_file:
        torch.save("of the core", tmp_path / "common.pt")
    write_common_pt(tmp_path)
    # megatron.core allows Namespace; with safe_globals, the tests after this one would find it taken back
    found = torch.load(tmp_path / "common.pt", weights_only=True)
    assert found == ("of the core" if has_file else STATE)
