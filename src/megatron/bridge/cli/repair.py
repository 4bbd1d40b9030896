# SPDX-License-Identifier: Apache-2.0
"""The subcommand `repair`."""

from pathlib import Path

import click

from megatron.bridge.cli.command import CHECKPOINT, TRUST, Command
from megatron.bridge.cli.show import show_flags
from megatron.bridge.cli.terminal import quiet
from megatron.bridge.cli.text import printable
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG
from megatron.bridge.repair import repair
from megatron.bridge.repair.problems import problems


@click.command("repair", cls=Command)
@CHECKPOINT
@click.option("--dry-run", is_flag=True, help="Print the plan, and change nothing.")
@click.option(
    "--hf-model",
    metavar="MODEL",
    help=f"Take the args from this Hugging Face model, a name on the hub or a folder. Default: use {RUN_CONFIG}.",
)
@TRUST
@click.pass_context
def command(ctx: click.Context, out: Path, dry_run: bool, hf_model: str | None, trust_remote_code: bool) -> None:
    """Repair the checkpoint at OUT so that Megatron-LM can load it.

    This fixes what import_ckpt of Megatron-Bridge 0.6 and earlier wrote (tracker 0, iter_0000000, no args), what
    somebody has partly fixed by hand, and what a killed import left. Weights are neither read nor copied. Training
    checkpoints are refused.
    """
    plan = repair.plan(out, hf_model, trust_remote_code)
    if not plan.steps:
        click.echo(f"{out} is a release checkpoint. There is nothing to repair.")
        return
    click.echo(f"{'Would repair' if dry_run else 'Repairing'} {out}:")
    if dry_run:
        for number, step in enumerate(plan.steps, 1):
            click.echo(f"  {number}. {printable(step.what)}")
        return
    numbers = iter(range(1, len(plan.steps) + 1))
    with quiet(ctx.obj) as terminal:
        repair.run(plan, lambda step: click.echo(f"  {next(numbers)}. {printable(step.what)}", file=terminal.out))
    found = examine(out)
    if wrong := problems(found):
        raise click.ClickException(
            f"{out} still has a problem after the repair: {printable(wrong[0].what)} "
            f"Run megatron-bridge inspect {out} to see it."
        )
    click.echo("Done.\n")
    show_flags(found)
