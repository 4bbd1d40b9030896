# SPDX-License-Identifier: Apache-2.0
"""Saves a model that has no weights: each tensor is converted when it is written, and is written block by block.

Layout, keys and file form are those of the other saves, for they are decided by the same code: Megatron Core's
translation of a sharded state dict to PyTorch's DCP. Only the last step differs, the writing of one item.
"""

import math
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer import MegatronModule
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.bridge.models.conversion.hf_checkpoint import is_finite, warn_of_non_finite
from megatron.bridge.models.conversion.piecewise_tensor import PiecewiseTensor, storage_of
from megatron.bridge.models.conversion.streaming_import import StreamedWeights, streamed_weights
from megatron.bridge.utils.common_utils import get_rank_safe


# What a writer thread holds in memory at once; the checksum and the write find it in the processor's cache.
BLOCK_BYTES = 1 << 20
# A thread writes a file of its own, which is worth the while from some size on.
BYTES_PER_THREAD = 64 << 20

Advance = Callable[[int], None]

_CHANGED = (
    "torch.save has changed, it writes the values of a tensor in another way: import with streaming=False, or with "
    "the torch that this release of Megatron-Bridge names"
)


def _processors() -> int:
    """Return how many processors are this rank's, from 1 to 8: those of its affinity, shared with its host's ranks."""
    return max(min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 8), 1)


THREADS = _processors()


def for_streamed_model(
    strategy: TorchDistSaveShardedStrategy, model: list[MegatronModule]
) -> TorchDistSaveShardedStrategy:
    """Return a strategy that streams the weights of `model`, or `strategy` itself for a model that has weights."""
    weights = streamed_weights(model)
    if weights is None:
        return strategy
    return StreamingSaveStrategy(
        weights,
        strategy.backend,
        strategy.version,
        keep_only_main_replica=strategy.keep_only_main_replica,
        thread_count=max(strategy.thread_count, THREADS),
    )


class StreamingSaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron Core's `torch_dist` format, its tensors resolved one by one.

    Args:
        weights: Where the values of the state dict's tensors come from.
        *args: As `TorchDistSaveShardedStrategy` has them.
        **kwargs: As `TorchDistSaveShardedStrategy` has them.
    """

    def __init__(self, weights: StreamedWeights, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = weights

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write `sharded_state_dict`; all ranks call this.

        Args:
            sharded_state_dict: The state dict, its factories applied, its tensors those of the model of `weights`.
            checkpoint_dir: An existing folder.

        Raises:
            OSError: A file can't be written.
            ValueError: A tensor of the checkpoint has another shape than the model's.
        """
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = StreamingSavePlanner(
            self.weights,
            dedup_replicated_tensors=not self.keep_only_main_replica,
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        try:
            dcp.save(
                mcore_to_pyt_state_dict(flat),
                storage_writer=StreamingWriter(checkpoint_dir, thread_count=self.thread_count),
                planner=planner,
            )
        except CheckpointException as error:
            # It holds the errors of all ranks with their tracebacks. The first one is what went wrong.
            raise next(iter(error.failures.values()))[0] from None


class StreamingSavePlanner(MCoreSavePlanner):
    """Megatron Core's planner, which gives each tensor its values when it is written.

    Args:
        weights: Where they come from.
        **kwargs: As `MCoreSavePlanner` has them.
    """

    def __init__(self, weights: StreamedWeights, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights = weights

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the bytes of an object, or a tensor of the item's shape and dtype, which may be a piecewise one."""
        data = super().resolve_data(write_item)
        return data if write_item.type == WriteItemType.BYTE_IO else self.weights.resolve(data)


class StreamingWriter(dcp.FileSystemWriter):
    """PyTorch's writer, holding one block of a tensor in memory at a time, in the form that `torch.save` gives it.

    And an error in any thread is raised: `FileSystemWriter` loses those of all but the first (torch 2.11).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of a plan, in one file a thread.

        Args:
            plan: What this rank writes.
            planner: Gives each item its data.

        Returns:
            A future that is done.
        """
        total = sum(_size(item) for item in plan.items)
        shares = _shares(plan.items, min(self.thread_count, 1 + total // BYTES_PER_THREAD))
        files = [(f"{plan.storage_data.prefix}{number}.distcp", items) for number, items in enumerate(shares)]
        stop = threading.Event()
        with (
            _progress(total) as advance,
            _threads_of_torch_shared(len(files)) as share,
            ThreadPoolExecutor(len(files), "streaming-save", torch.set_num_threads, (share,)) as pool,
        ):

            def write(name: str, items: list[WriteItem]) -> list[WriteResult]:
                try:
                    return self._write_file(name, items, planner, stop, advance)
                except BaseException:
                    stop.set()
                    raise

            written = [pool.submit(write, name, items) for name, items in files]
            try:
                results = [result for future in written for result in future.result()]
            except BaseException:
                stop.set()
                raise
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(
        self, name: str, items: list[WriteItem], planner: SavePlanner, stop: threading.Event, advance: Advance
    ) -> list[WriteResult]:
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in items:
                if stop.is_set():
                    break
                start = stream.tell()
                data = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    stream.write(data.getbuffer())
                elif not _write_tensor(stream, PiecewiseTensor.wrap(data), stop, advance):
                    warn_of_non_finite([item.index.fqn])
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        return results


@dataclass
class _Archive:
    """What `torch.save` writes around the values of a tensor: a zip archive, with a gap where they belong."""

    before: bytes = b""
    gap: int = 0
    after: bytes = b""

    @classmethod
    def around(cls, tensor: torch.Tensor) -> "_Archive":
        archive = cls()
        values = torch.empty(0, dtype=tensor.dtype)
        if tensor.nbytes:
            # They are not read, so this needs addresses only: read-only memory is not counted against the host's.
            memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
            values.set_(storage_of(memory))
        with torch.serialization.skip_data():
            torch.save(values.view(tensor.shape), archive)
        if archive.gap != tensor.nbytes:
            raise OSError(_CHANGED)
        return archive

    def write(self, data: Any) -> int:
        if self.gap:
            self.after += bytes(data)
        else:
            self.before += bytes(data)
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        if whence != os.SEEK_CUR or self.gap:
            raise OSError(_CHANGED)
        self.gap = offset
        return offset

    def flush(self) -> None:
        pass

    def end(self, checksum: int) -> bytes:
        """Return what follows the values, whose CRC-32 `torch.save` could not know.

        It is in the data descriptor, which comes first, and in the entry of the central directory (APPNOTE.TXT 6.3.10,
        sections 4.3.9 and 4.3.12).
        """
        after = bytearray(self.after)
        # The name follows 46 bytes of its entry, and torch.save calls the archive "archive".
        entry = after.find(b"archive/data/0") - 46
        if after[:4] != b"PK\x07\x08" or entry < 0 or after[entry : entry + 4] != b"PK\x01\x02":
            raise OSError(_CHANGED)
        for at in (4, entry + 16):
            after[at : at + 4] = checksum.to_bytes(4, "little")
        return bytes(after)


def _write_tensor(stream: IO[bytes], tensor: PiecewiseTensor, stop: threading.Event, advance: Advance) -> bool:
    """Write a tensor; returns whether what was written is finite."""
    archive = _Archive.around(tensor)
    stream.write(archive.before)
    checksum = 0
    finite = True
    for block in tensor.blocks(BLOCK_BYTES):
        if stop.is_set():
            return True
        finite = finite and is_finite(block)
        values = block.view(torch.uint8).numpy()
        checksum = zlib.crc32(values, checksum)
        stream.write(values)
        advance(values.nbytes)
    stream.write(archive.end(checksum) if archive.gap else archive.after)
    return finite


def _shares(items: list[WriteItem], count: int) -> list[list[WriteItem]]:
    """Split items so that each share has about as many bytes as any other, and keeps their order."""
    shares: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for at in sorted(range(len(items)), key=lambda at: -_size(items[at])):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(at)
        sizes[smallest] += _size(items[at])
    return [[items[at] for at in sorted(share)] for share in shares]


def _size(item: WriteItem) -> int:
    """Return the bytes of an item, 0 for an object."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


@contextmanager
def _threads_of_torch_shared(count: int) -> Iterator[int]:
    """Say how many threads of torch each of `count` threads may use.

    Else each uses as many as there are processors, which wait for one another in loops. What is set for a thread is
    the default of those that are started later, too, and what MKL uses: hence it is set again.
    """
    threads = torch.get_num_threads()
    try:
        yield max(threads // count, 1)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """Show how many of `total` bytes are written, on rank 0 and on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    if get_rank_safe() != 0 or not console.is_terminal:
        yield lambda written: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("importing", total=total)
        yield lambda written: progress.advance(task, written)
