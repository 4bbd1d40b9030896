# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes of this host, which form a process group as torchrun's ranks do.

The processes are forked from a server that has imported what they need, and nothing else: no thread, no process group.
So they start as fast as one, and share the memory of the modules. They end with the calling process, however it ends.

What a rank asks about its group works under torchrun, too.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any


__all__ = ["has_to_say", "hide_accelerators", "in_group", "is_first", "run"]

_ADDRESS, _PORT, _RUN_ID = "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"
_LOCAL, _ALL = "LOCAL_WORLD_SIZE", "WORLD_SIZE"
# What is hidden from an import in several processes: they would share the GPUs, and a conversion needs none.
_ACCELERATORS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_FAILED = "megatron-bridge/failed"
_SECONDS_TO_CLEAN_UP = 30
_SECONDS_TO_REPEAT = 1.0
# How long a rank that has lost another one waits for that one to say why.
_SECONDS_TO_EXPLAIN = 3.0
# gloo's errors are RuntimeErrors of this text (third_party/gloo, transport/tcp/pair.cc; torch 2.11).
_LOST = re.compile(r"\bgloo\b|Connection (closed|reset|refused)|Broken pipe")


def in_group() -> bool:
    """Return whether this process is one of several ranks that torchrun or `run` started."""
    return _RUN_ID in os.environ and int(os.environ.get(_ALL) or 1) > 1


def is_first() -> bool:
    """Return whether this process is rank 0, or no rank."""
    return not in_group() or os.environ["RANK"] == "0"


def hide_accelerators() -> None:
    """Let this process and its children see no GPU. Has to come before the first import of torch."""
    os.environ.update(dict.fromkeys(_ACCELERATORS, ""))


def run(function: Callable[..., None], arguments: tuple, count: int, preload: str) -> None:
    """Call a function in several processes, and wait for them.

    Args:
        function: A function of a module. If it fails, it says why on stderr, once in all ranks (`has_to_say`).
        arguments: Its arguments, which must be picklable.
        count: The number of processes.
        preload: The module that the server imports.

    Raises:
        ChildProcessError: A process has ended, and none has said why.
        SystemExit: The function has failed, and has said why.
    """
    hide_accelerators()
    # Their hosts' names may lead elsewhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([preload])
    # It imports while this process imports torch.
    forkserver.ensure_running()
    import torch.distributed as dist
    import torch.multiprocessing as torch_processes

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[BaseProcess] = []
    seconds_to_explain = 0.0
    try:
        with _interrupted_later():
            # A process that was started without its work would let the others wait for it.
            started += torch_processes.start_processes(
                _on_rank, (count, store.port, function, arguments), count, join=False, start_method="forkserver"
            ).processes
        failed = _first_to_fail(started)
        seconds_to_explain = _SECONDS_TO_EXPLAIN
    finally:
        # If this process is interrupted, they end at once: they might publish what nobody wants any more.
        with _interrupted_later():
            _end(started, seconds_to_explain)
    if failed is None:
        return
    if store.check([_FAILED]):
        raise SystemExit(1)
    code = started[failed].exitcode
    assert code is not None  # it has ended
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = " It may have run out of memory." if code == -signal.SIGKILL else ""
    raise ChildProcessError(
        f"process {failed + 1} of {count} ended with {ended} before it was done.{hint} Run the command again."
    )


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Handle signals that interrupt this process at the end of the block."""
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _first_to_fail(processes: Sequence[BaseProcess]) -> int | None:
    """Wait until a process has failed, and return its position, or until all have ended well."""
    running = {process.sentinel: at for at, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(running):
            at = running.pop(sentinel)
            processes[at].join()
            if processes[at].exitcode:
                return at
    return None


def _end(processes: Sequence[BaseProcess], seconds_to_explain: float) -> None:
    """Wait for processes that end by themselves, since they have lost another one, and end the others."""
    # Of two signals at once, another thread may take both, and the main thread goes on waiting: send one more.
    ends = ((BaseProcess.terminate, _SECONDS_TO_REPEAT), (BaseProcess.terminate, _SECONDS_TO_CLEAN_UP))
    for act, seconds in ((_let_be, seconds_to_explain), *ends, (BaseProcess.kill, _SECONDS_TO_CLEAN_UP)):
        until = time.monotonic() + seconds
        for process in processes:
            if process.is_alive():
                act(process)
        for process in processes:
            process.join(max(until - time.monotonic(), 0))


def _let_be(process: BaseProcess) -> None:
    pass


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank on one host."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, _ALL: count, _LOCAL: count}
    where = {_ADDRESS: "127.0.0.1", _PORT: port, _RUN_ID: "processes", "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (ranks | where).items()}


def _on_rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(_environment(rank, count, port))
    for number in _INTERRUPTS:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt_once)
    # The server lives as long as a process that it forked, so its end doesn't tell of the caller's.
    threading.Thread(target=_end_with_caller, daemon=True).start()
    function(*arguments)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Interrupt this process once: after an interrupt of the terminal, the caller's SIGTERM finds it cleaning up."""
    for each in _INTERRUPTS:
        # Python writes to stderr of a signal that has come before it is ignored (`signal.SIG_IGN`).
        signal.signal(each, lambda number, frame: None)
    raise KeyboardInterrupt


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None, "this process was started by another one"
    caller.join()
    # A call that waits for another rank lets no handler run. This signal has none, and ends the process.
    signal.alarm(_SECONDS_TO_CLEAN_UP)
    os.kill(os.getpid(), signal.SIGTERM)


def has_to_say(error: BaseException) -> bool:
    """Return whether this process is the one that reports an error. In a group, that is the first one to ask."""
    if not in_group():
        return True
    if isinstance(error, KeyboardInterrupt):
        return False
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        # It ended because another one did. On the same host, whoever started them sees which.
        if os.environ[_LOCAL] == os.environ[_ALL]:
            return False
        time.sleep(_SECONDS_TO_EXPLAIN)
    return _speaks_first()


def _speaks_first() -> bool:
    from datetime import timedelta

    import torch.distributed as dist

    try:
        store: Any = dist.TCPStore(
            os.environ[_ADDRESS], int(os.environ[_PORT]), is_master=False, timeout=timedelta(seconds=5)
        )
        # A rank may ask twice, and so may a process that it has started.
        rank = os.environ["RANK"]
        return store.compare_set(_FAILED, "", rank) == rank.encode()
    except Exception:
        # Whoever held the store is gone.
        return True
