# SPDX-License-Identifier: Apache-2.0
"""The subcommand `completion`. It imports neither torch nor Megatron Core."""

import click
from click.shell_completion import get_completion_class

from megatron.bridge.cli.command import Command


_NAME, _VARIABLE = "megatron-bridge", "_MEGATRON_BRIDGE_COMPLETE"


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a completion script for the shell SHELL.

    The shell then completes subcommands, options, and paths. For bash, add this line to ~/.bashrc:
    eval "$(megatron-bridge completion bash)". For zsh, add the same line with zsh to ~/.zshrc. For fish, run:
    megatron-bridge completion fish > ~/.config/fish/completions/megatron-bridge.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click supports all three shells"
    click.echo(kind(ctx.find_root().command, {}, _NAME, _VARIABLE).source())
