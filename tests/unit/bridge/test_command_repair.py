# SPDX-License-Identifier: Apache-2.0
"""The subcommand `repair`, and what reaches the terminal while it runs."""

import logging
import os
from pathlib import Path

from click.testing import CliRunner

from megatron.bridge.cli import main
from megatron.bridge.cli.terminal import quiet


def test_an_error_is_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, ["repair", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_packages_are_kept_from_the_terminal(capfd):
    with quiet(verbose=False) as terminal:
        os.write(1, b"noise")
        print("noise")
        logging.getLogger("megatron.bridge.models.x").warning("a\nwarning\x1b")
        logging.getLogger("megatron.bridge.verify.at_import").warning("a proof")
        terminal.note("a note")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "Note: a note\nWarning: a warning?\nWarning: a proof\n")
