# SPDX-License-Identifier: Apache-2.0
"""Runs a function in a process of its own that has the stand-ins of `stand_ins.py`.

Megatron Core decides when it is imported whether there is a Transformer Engine, and a user's process has imported it.
So a conversion that needs Transformer Engine's layout runs in a new process, which installs the stand-ins first. It
needs no `__main__` guard. Its output, logs, warnings, and errors appear in the calling process, which nothing else of
it reaches. It ends with the calling process.

Under torchrun, each rank has such a process. These processes form a group of their own.
"""

import builtins
import contextlib
import functools
import importlib
import io
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn


__all__ = ["run"]

_CALLS = itertools.count(1)
# What torchrun and `torch.distributed` leave in the environment of a process.
_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STREAMS = ("stdout", "stderr")
_SECONDS_TO_CLEAN_UP = 30


def run(convert: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a function in a new process, pass its output on, and return or raise what it returns or raises.

    Args:
        convert: A function of a module, or a function or class method of a class. It may be decorated.
        args: Its arguments, which must be picklable.
        kwargs: Its keyword arguments, which must be picklable.

    Raises:
        TypeError: An argument can't be pickled.
        RuntimeError: The process died, or this one has a process group that the new ones can't form, too.
    """
    named = {f"argument {index} of {convert.__qualname__}": value for index, value in enumerate(args)}
    named |= {f"the argument {name} of {convert.__qualname__}": value for name, value in kwargs.items()}
    request = {
        "function": (convert.__module__, convert.__qualname__),
        "names": list(kwargs),
        "arguments": {name: _pickled(name, value) for name, value in named.items()},
        "terminals": {name: _is_terminal(name) for name in _STREAMS},
        "levels": {"": logging.root.level} | _levels(),
    }
    ours, theirs = Pipe()
    with ours, theirs:
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            env=_environment(convert),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # this process passes interrupts on
        )
        theirs.close()
        try:
            ours.send(request)
            return _follow(ours, process)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_CLEAN_UP)
            raise
        finally:
            ours.close()
            process.wait()


def _pickled(name: str, value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"{name} is a {type(value).__name__} that can't be pickled ({error}); expected a value for the process "
            "that converts this model: pass a plain value"
        ) from error


def _is_terminal(name: str) -> bool:
    try:
        return getattr(sys, name).isatty()
    except Exception:  # no stream, a closed one, or one of a notebook
        return False


def _levels() -> dict[str, int]:
    loggers = logging.root.manager.loggerDict.items()
    return {name: each.level for name, each in loggers if isinstance(each, logging.Logger) and each.level}


def _environment(convert: Callable) -> dict[str, str]:
    """Return the environment of the new process: this one's path for modules, and a process group of its own."""
    import torch.distributed as dist

    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    if dist.is_torchelastic_launched():
        # Part of the prefix under which the ranks meet (host/accelerator.py).
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return environment | {"TORCHELASTIC_RESTART_COUNT": f"{restarts}-conversion-{next(_CALLS)}"}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"{convert.__qualname__} needs new processes, and found a process group of {dist.get_world_size()} ranks "
            "that torchrun didn't start: start the ranks with torchrun, or convert in one process"
        )
    return {name: value for name, value in environment.items() if name not in _OF_A_GROUP}


def _follow(connection: Connection, process: subprocess.Popen) -> Any:
    """Pass on what the process sends, until it sends its result."""
    warned: dict[Any, Any] = {}
    while True:
        try:
            kind, content = connection.recv()
        except EOFError:
            code = process.wait()
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = ": it may have run out of memory" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"the process that converts ended with {ended}{hint}") from None
        if kind == "result":
            return content
        if kind == "error":
            error, trace = content
            raise error from _Remote(trace)
        if kind == "log" and logging.getLogger(content.name).isEnabledFor(content.levelno):
            logging.getLogger(content.name).handle(content)
        if kind == "warning":
            message, category, file, line = content
            warnings.warn_explicit(message, category, file, line, registry=warned)
        if kind in _STREAMS and getattr(sys, kind) is not None:
            getattr(sys, kind).write(content)
            getattr(sys, kind).flush()


class _Remote(Exception):
    """The traceback of the process that converts, as the cause of its error."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"\n{trace}")


class _Sender:
    """Sends what happens in this process to the process that started it, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        with self._lock:
            self._connection.send((kind, content))

    def warn(self, message: Warning | str, category: type, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        known = category if category.__module__ == builtins.__name__ else UserWarning
        self.send("warning", (str(message), known, filename, lineno))

    def error(self, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self.send("error", (error, trace))


class _Handler(logging.Handler):
    """Sends log records, with their text made here."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        record.msg, record.args, record.exc_info, record.exc_text = message, None, None, None
        own = {name: value for name, value in vars(record).items() if isinstance(value, str | int | float | None)}
        self._sender.send("log", logging.makeLogRecord(own))


class _Stream(io.TextIOBase):
    """Sends what is printed."""

    def __init__(self, sender: _Sender, name: str, is_terminal: bool) -> None:
        self._sender, self._name, self._is_terminal = sender, name, is_terminal

    def write(self, text: str) -> int:
        self._sender.send(self._name, text)
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal

    def writable(self) -> bool:
        return True


def _serve(connection: Connection) -> None:
    """Install the stand-ins, and run the function that the process at the other end asks for."""
    request, sender = connection.recv(), _Sender(connection)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        function = _function(*request["function"])
        for name in _STREAMS:
            setattr(sys, name, _Stream(sender, name, request["terminals"][name]))
        warnings.showwarning = sender.warn
        warnings.simplefilter("always")  # the process at the other end filters them
        logging.root.handlers = [_Handler(sender)]
        for name, level in request["levels"].items():
            logging.getLogger(name).setLevel(level)
        sender.send("result", _run(function, request))
    except BaseException as error:
        sender.error(error)


def _function(module: str, names: str) -> Callable:
    """Import a function in the presence of the stand-ins, without the warnings that its packages gave before."""
    from megatron.bridge.host import stand_ins

    stand_ins.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return functools.reduce(getattr, names.split("."), importlib.import_module(module))


def _run(function: Callable, request: dict[str, Any]) -> Any:
    values = [_unpickled(*each) for each in request["arguments"].items()]
    count = len(values) - len(request["names"])
    named = dict(zip(request["names"], values[count:], strict=True))
    # A class method has its class among the arguments.
    return getattr(function, "__func__", function)(*values[:count], **named)


def _unpickled(name: str, pickled: bytes) -> Any:
    try:
        return pickle.loads(pickled)
    except Exception as error:
        raise TypeError(
            f"{name} can't be read by the process that converts ({error}): pass a value of a class that an import "
            "finds, not one that the script itself defines"
        ) from error


def _end_with(connection: Connection) -> NoReturn:
    """End this process when the one at the other end has ended."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
