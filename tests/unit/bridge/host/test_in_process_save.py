# SPDX-License-Identifier: Apache-2.0
"""Saving on a host without an accelerator."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron.bridge.host import accelerator
from megatron.bridge.host.saving import InProcessSaveStrategy, strategy_for_this_host


without_accelerator = pytest.mark.skipif(
    accelerator.is_available(), reason="shows what happens without an accelerator"
)


def test_a_host_with_an_accelerator_keeps_its_strategy(monkeypatch):
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    strategy = TorchDistSaveShardedStrategy()
    assert strategy_for_this_host(strategy) is strategy


@without_accelerator
def test_settings_of_the_strategy_are_kept():
    strategy = strategy_for_this_host(TorchDistSaveShardedStrategy(keep_only_main_replica=False, thread_count=5))
    assert isinstance(strategy, InProcessSaveStrategy)
    assert (strategy.keep_only_main_replica, strategy.thread_count) == (False, 5)


@without_accelerator
@accelerator.with_process_group
def test_what_is_saved_within_the_process_loads(tmp_path, monkeypatch):
    def fail(self):
        raise AssertionError("a process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fail)
    weight = torch.arange(6.0).reshape(2, 3)
    saved = {"model": {"weight": ShardedTensor.from_rank_offsets("weight", weight)}, "iteration": 7}
    dist_checkpointing.save(saved, str(tmp_path), strategy_for_this_host(TorchDistSaveShardedStrategy()))
    into = {"model": {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3))}}
    loaded = dist_checkpointing.load(into, str(tmp_path))
    assert torch.equal(loaded["model"]["weight"], weight)
    assert loaded["iteration"] == 7
