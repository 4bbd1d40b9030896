# SPDX-License-Identifier: Apache-2.0
"""Saves a sharded state dict of piecewise tensors: Megatron Core plans the files, and a writer fills them in blocks.

Layout, keys and the form of the files are those of other saves, because the same code of Megatron Core and PyTorch
decides them. Only the last step differs, writing one item.
"""

import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.bridge.host.saving import InProcessSaveStrategy
from megatron.bridge.models.conversion import casts
from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite
from megatron.bridge.models.conversion.streaming import execute
from megatron.bridge.models.conversion.streaming.archive import Archive
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.release_checkpoint.target import check_space


class StreamingSaveStrategy(InProcessSaveStrategy):
    """Megatron Core's `torch_dist` format, written block by block."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write `sharded_state_dict`, as `InProcessSaveStrategy` does, and raise the first error as it is."""
        try:
            super().save(sharded_state_dict, checkpoint_dir)
        except CheckpointException as error:
            # It holds the errors of all ranks with their tracebacks.
            raise next(iter(error.failures.values()))[0] from None

    def writer(self, checkpoint_dir: str | Path) -> "StreamingWriter":
        """Return a writer with a thread for each processor."""
        return StreamingWriter(checkpoint_dir, thread_count=max(self.thread_count, execute.processors()))


@dataclass(frozen=True)
class _Written(WriteResult):
    """What a rank tells the coordinator of an item: also whether its values are finite."""

    is_finite: bool = True


class StreamingWriter(dcp.FileSystemWriter):
    """PyTorch's writer, with one block of a tensor in memory at a time.

    It also raises an error of any thread. `FileSystemWriter` loses those of all threads but the first (torch 2.11).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of a plan, in one file a thread, and return a future that is done."""
        sizes = [_size(item) for item in plan.items]
        total = sum(sizes)
        check_space(Path(self.path), total)
        files = execute.shares(sizes, min(self.thread_count, 1 + total // execute.BYTES_PER_THREAD))
        jobs = [
            partial(
                self._write_file,
                f"{plan.storage_data.prefix}{number}.distcp",
                [plan.items[at] for at in share],
                planner,
            )
            for number, share in enumerate(files)
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for results in execute.run(jobs, total, "importing") for result in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, and warn of what any rank has found. The coordinator calls it."""
        super().finish(metadata, results)
        written = [each for of_rank in results for each in of_rank if isinstance(each, _Written)]
        warn_of_non_finite(sorted({each.index.fqn for each in written if not each.is_finite}))

    def _write_file(
        self, name: str, items: Iterable[WriteItem], planner: SavePlanner, advance: execute.Advance
    ) -> list[WriteResult]:
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in items:
                start = stream.tell()
                data, is_finite = planner.resolve_data(item), True
                if item.type == WriteItemType.BYTE_IO:
                    stream.write(data.getbuffer())
                elif not (is_finite := write_tensor(stream, PiecewiseTensor.wrap(data), advance)):
                    casts.check_pieces(item.index.fqn, PiecewiseTensor.wrap(data))
                length = stream.tell() - start
                results.append(_Written(item.index, length, _StorageInfo(name, start, length), is_finite))
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        return results


def write_tensor(stream: IO[bytes], tensor: PiecewiseTensor, advance: execute.Advance) -> bool:
    """Write a tensor as `torch.save` does, and return whether its values are finite."""
    archive = Archive.around(tensor)
    stream.write(archive.before)
    checksum, finite = 0, True
    for block in tensor.blocks(execute.BLOCK_BYTES):
        finite = finite and is_finite(block)
        values = block.view(torch.uint8).numpy()
        checksum = zlib.crc32(values, checksum)
        stream.write(values)
        advance(values.nbytes)
    stream.write(archive.after(checksum))
    return finite


def _size(item: WriteItem) -> int:
    """Return the bytes of an item, 0 for an object."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
