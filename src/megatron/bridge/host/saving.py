# SPDX-License-Identifier: Apache-2.0
"""Saves a distributed checkpoint within the calling process, without CUDA."""

from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.msc_utils import MultiStorageClientFeature

from megatron.bridge.host import accelerator


__all__ = ["InProcessSaveStrategy", "strategy_for_this_host"]


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """Writes Megatron Core's `torch_dist` format with PyTorch's file system writer.

    Megatron Core uses its asynchronous writer for synchronous saves, too. That writer synchronizes CUDA devices and
    starts a process (core 0.19, dist_checkpointing/strategies/filesystem_async.py), which a script without a
    `__main__` guard can't do. PyTorch's writer does neither, and its files are the same.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Writes `sharded_state_dict`. All ranks must call this.

        Args:
            sharded_state_dict: The state dict, with its factories applied.
            checkpoint_dir: An existing folder, or a MultiStorageClient URL.
        """
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(
            mcore_to_pyt_state_dict(flat),
            storage_writer=self.writer(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )

    def writer(self, checkpoint_dir: str | Path) -> dcp.StorageWriter:
        """Returns what writes the files."""
        if MultiStorageClientFeature.is_enabled():
            msc = MultiStorageClientFeature.import_package()
            return msc.torch.MultiStorageFileSystemWriter(str(checkpoint_dir), thread_count=self.thread_count)
        return dcp.FileSystemWriter(checkpoint_dir, thread_count=self.thread_count)


def strategy_for_this_host(strategy: TorchDistSaveShardedStrategy) -> TorchDistSaveShardedStrategy:
    """Returns `strategy`, or an in-process strategy with the same settings on a host without an accelerator."""
    if accelerator.is_available():
        return strategy
    return InProcessSaveStrategy(
        strategy.backend,
        strategy.version,
        keep_only_main_replica=strategy.keep_only_main_replica,
        thread_count=strategy.thread_count,
    )
