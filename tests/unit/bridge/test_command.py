# SPDX-License-Identifier: Apache-2.0
"""The frame of the command: help, errors in one line, and text for people."""

import errno
import os

import click
import pytest
from click.testing import CliRunner

from megatron.bridge.cli import main
from megatron.bridge.cli.command import Command
from megatron.bridge.cli.text import human_bytes, printable


class OfAllRanks(BaseException):
    """As PyTorch's CheckpointException."""

    def __init__(self, error: Exception):
        super().__init__("a traceback\n" * 80)
        self.failures = {0: (error, "a traceback")}


def run(error: BaseException, *arguments: str) -> str:
    """Give what a subcommand prints that ends with an error."""

    @click.command(cls=Command)
    def command() -> None:
        raise error

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1 and bool(result.stderr) != bool(arguments)
    return result.stderr


def test_help_is_there():
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a file: damaged.\nDownload it again."), "a file: damaged. Download it again."),
        (KeyError("x"), "KeyError: 'x'. Pass --verbose to see where it happened."),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f"),
            "f: No space left on device. Free space there, and run the command again.",
        ),
    ],
)
def test_an_error_is_one_line(error: Exception, line: str):
    assert run(error) == f"Error: {line}\n"
    run(error, "--verbose")


def test_an_error_that_is_no_exception_is_one_line():
    assert run(OfAllRanks(ValueError("a file: damaged"))) == "Error: a file: damaged\n"


def test_text_for_people():
    assert (human_bytes(999), human_bytes(1_500_000)) == ("999 bytes", "1.5 MB")
    assert printable("a\x1b[2Jb") == "a?[2Jb"
