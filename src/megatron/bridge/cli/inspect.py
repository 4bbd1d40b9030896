# SPDX-License-Identifier: Apache-2.0
"""The subcommand `inspect`. It imports neither torch nor Megatron Core."""

import json
import sys
from pathlib import Path

import click

from megatron.bridge.cli.command import CHECKPOINT, JSON, Command
from megatron.bridge.cli.show import describe, show
from megatron.bridge.release_checkpoint.examine import examine


@click.command("inspect", cls=Command)
@CHECKPOINT
@JSON
def command(out: Path, as_json: bool) -> None:
    """Show what OUT holds and which Megatron-LM loads it.

    OUT is a checkpoint root or one of its payload folders. The flags for Megatron-LM are printed, too. Only metadata
    is read, no weights, and no pickle is run. The exit code is 1 if the checkpoint has a problem.
    """
    document = describe(examine(out))
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        show(document)
    sys.exit(0 if document["ok"] else 1)
