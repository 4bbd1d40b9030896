# SPDX-License-Identifier: Apache-2.0
"""What a process of its own gets, and what of it appears in the calling process."""

import logging
import os
import signal
import sys
import threading
import time
import warnings

import pytest

from megatron.bridge.host import own_process, stand_ins


class Converter:
    """What `AutoBridge` is to the module."""

    @classmethod
    def convert(cls, value, *, times=1):
        print("printed", value)
        print("an error", file=sys.stderr)
        logging.getLogger("megatron.bridge.tests").warning("logged %s", value)
        logging.getLogger("megatron.bridge.tests").debug("not logged")
        warnings.warn("warned", stacklevel=1)
        return cls.__name__, value * times, os.getpid(), stand_ins.are_installed(), os.environ.get("RANK")


def fail(message):
    raise ValueError(message)


def die(number):
    os.kill(os.getpid(), number)


def test_a_conversion_runs_elsewhere_and_is_heard_here(capsys, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    environment = dict(os.environ)
    with pytest.warns(UserWarning, match="warned"):
        name, value, process, has_stand_ins, rank = own_process.run(
            Converter.convert.__func__, (Converter, "a"), {"times": 2}
        )
    assert (name, value, has_stand_ins, rank) == ("Converter", "aa", True, None)
    assert process != os.getpid() and not stand_ins.are_installed() and dict(os.environ) == environment
    printed = capsys.readouterr()
    assert "printed a\n" in printed.out and "an error\n" in printed.err
    assert [record.getMessage() for record in caplog.records if record.name == "megatron.bridge.tests"] == ["logged a"]


def test_an_error_is_raised_here_with_the_traceback_of_there():
    with pytest.raises(ValueError, match="^no such model$") as raised:
        own_process.run(fail, ("no such model",), {})
    assert "in fail" in str(raised.value.__cause__)


def test_a_process_that_dies_is_told():
    with pytest.raises(RuntimeError, match="ended with signal SIGKILL: it may have run out of memory"):
        own_process.run(die, (signal.SIGKILL,), {})


def wait(state):
    state.write_text("started")
    try:
        time.sleep(300)
    finally:
        state.write_text("cleaned up")


def test_an_interrupt_lets_it_clean_up(tmp_path):
    state, before = tmp_path / "state", signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        while not state.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            own_process.run(wait, (state,), {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert state.read_text() == "cleaned up"


def test_an_argument_that_cannot_be_pickled_is_named():
    with pytest.raises(TypeError, match="the argument message of fail is a lock that can't be pickled") as raised:
        own_process.run(fail, (), {"message": threading.Lock()})
    assert "\n" not in str(raised.value)


class Unknown:
    """A class of a module that the new process doesn't find."""


def test_an_argument_that_cannot_be_read_there_is_named(monkeypatch):
    monkeypatch.setattr(Unknown, "__module__", "a_script")
    monkeypatch.setitem(sys.modules, "a_script", sys.modules[__name__])
    with pytest.raises(TypeError, match="argument 0 of fail can't be read by the process that converts.*a_script"):
        own_process.run(fail, (Unknown(),), {})
