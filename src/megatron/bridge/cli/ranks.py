# SPDX-License-Identifier: Apache-2.0
"""A subcommand in several processes."""

import click

from megatron.bridge.cli.command import ARGUMENTS
from megatron.bridge.host import processes


PROCESSES = click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Divide the weights between this many processes of the host. Under torchrun, its ranks divide them instead.",
)


def in_processes(ctx: click.Context, count: int) -> bool:
    """Run the subcommand in several processes if that is asked for, unless this process is one of them."""
    if count == 1 or processes.in_group():
        return False
    processes.run(_main, (ctx.meta[ARGUMENTS],), count, preload="megatron.bridge.cli.preloaded")
    return True


def _main(arguments: list[str]) -> None:
    from megatron.bridge.cli import main

    main(arguments, prog_name="megatron-bridge")
