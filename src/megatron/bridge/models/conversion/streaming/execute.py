# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan: runs jobs that write files, in threads, with a progress bar. It knows nothing of models."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megatron.bridge.utils.common_utils import get_rank_safe


# The values that a job holds in memory at once. They stay in the processor's cache from one use to the next.
BLOCK_BYTES = 1 << 20
# A file of its own is worth a thread from this size on.
BYTES_PER_THREAD = 64 << 20

T = TypeVar("T")
Advance = Callable[[int], None]


class _Stopped(Exception):
    """Another job failed."""


def processors() -> int:
    """Return how many processors this rank has, from 1 to 8: those of its affinity, shared with its host's ranks."""
    return max(min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 8), 1)


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Return the positions of items, in order, in `count` lists whose items have about the same size in sum."""
    result: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        smallest = totals.index(min(totals))
        result[smallest].append(item)
        totals[smallest] += sizes[item]
    return [sorted(share) for share in result]


def run(jobs: Sequence[Callable[[Advance], T]], total: int, description: str) -> list[T]:
    """Run jobs, each in a thread of its own, and return their results. If one fails, the others stop.

    Args:
        jobs: Called with a function that they tell how many bytes they wrote, after each block.
        total: The number of bytes that all jobs write.
        description: What the progress bar says.

    Raises:
        Exception: The error of a job.
    """
    stop = threading.Event()
    threads = torch.get_num_threads()

    def guarded(job: Callable[[Advance], T], advance: Advance) -> T:
        def advance_or_stop(written: int) -> None:
            if stop.is_set():
                raise _Stopped
            advance(written)

        # Otherwise each thread has as many threads of torch as there are processors, which wait for one another in
        # loops.
        torch.set_num_threads(max(threads // len(jobs), 1))
        try:
            return job(advance_or_stop)
        except BaseException:
            stop.set()
            raise

    with _progress(total, description) as advance, ThreadPoolExecutor(len(jobs), "streaming") as pool:
        running = [pool.submit(guarded, job, advance) for job in jobs]
        try:
            wait(running)
        except BaseException:
            stop.set()
            raise
        finally:
            # What is set for a thread is also the default of threads that are started later, and what MKL uses.
            torch.set_num_threads(threads)
    for error in (job.exception() for job in running):
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return [job.result() for job in running]


@contextmanager
def _progress(total: int, description: str) -> Iterator[Advance]:
    """Show how many of `total` bytes are written, on rank 0 and on a terminal only."""
    console = Console(stderr=True)
    if get_rank_safe() != 0 or not console.is_terminal:
        yield lambda written: None
        return
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda written: progress.advance(task, written)
