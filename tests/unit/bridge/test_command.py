# SPDX-License-Identifier: Apache-2.0
"""The frame of the command: help, errors in one line, and text for people."""

import errno
import os

import click
import pytest
from click.testing import CliRunner

from megatron.bridge.cli import main
from megatron.bridge.cli.command import JSON, Command
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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_command(shell: str, monkeypatch: pytest.MonkeyPatch):
    script = CliRunner().invoke(main, ["completion", shell])
    assert script.exit_code == 0 and f"_MEGATRON_BRIDGE_COMPLETE={shell}_complete" in script.stdout
    monkeypatch.setenv("COMP_WORDS", "megatron-bridge comp")
    monkeypatch.setenv("COMP_CWORD", "comp" if shell == "fish" else "1")
    monkeypatch.setenv("_MEGATRON_BRIDGE_COMPLETE", f"{shell}_complete")
    completed = CliRunner().invoke(main, prog_name="megatron-bridge")
    assert "completion" in completed.stdout.replace(",", "\n").split()


def test_exit_codes_are_those_of_the_documentation():
    def exits(error: BaseException | None) -> int:
        @click.command(cls=Command)
        @click.argument("number", type=int)
        def command(number: int) -> None:
            if error is not None:
                raise error

        return CliRunner().invoke(command, ["1"]).exit_code

    assert [exits(error) for error in (None, ValueError("wrong"), KeyboardInterrupt(), OfAllRanks(OSError()))] == [
        0,
        1,
        1,
        1,
    ]
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 2


def test_quiet_leaves_warnings_and_errors():
    @click.command(cls=Command)
    @JSON
    def command(as_json: bool) -> None:
        print("printed")
        click.echo("a warning", err=True)
        click.echo("{}")

    for arguments, printed in (([], "printed\n{}\n"), (["--quiet"], ""), (["-q", "--json"], "printed\n{}\n")):
        result = CliRunner().invoke(command, arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (0, printed, "a warning\n")


def test_every_subcommand_prints_json():
    for name in {*main.list_commands(click.Context(main))} - {"completion"}:
        assert "--json" in CliRunner().invoke(main, [name, "--help"]).stdout, name
