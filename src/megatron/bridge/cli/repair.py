# SPDX-License-Identifier: Apache-2.0
"""The subcommand `repair`."""

import json
from pathlib import Path
from typing import TextIO

import click

from megatron.bridge.cli.command import CHECKPOINT, JSON, TRUST, Command
from megatron.bridge.cli.show import describe, show_flags
from megatron.bridge.cli.terminal import quiet
from megatron.bridge.cli.text import printable
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG
from megatron.bridge.repair import repair
from megatron.bridge.repair.problems import problems


@click.command("repair", cls=Command)
@CHECKPOINT
@click.option("--dry-run", is_flag=True, help="Print the plan and change nothing.")
@click.option(
    "--hf-model",
    metavar="MODEL",
    help=f"Take the args from this Hugging Face model, a folder or a name on the hub. Default: use {RUN_CONFIG}.",
)
@TRUST
@JSON
@click.pass_context
def command(
    ctx: click.Context, out: Path, dry_run: bool, hf_model: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Repair the checkpoint at OUT so that Megatron-LM can load it.

    This fixes the checkpoints of import_ckpt in Megatron-Bridge 0.6 and earlier (tracker 0, iter_0000000, no args),
    also if somebody has partly fixed them by hand, and removes what a killed import left. Weights are neither read nor
    copied. Training checkpoints are refused.
    """
    plan = repair.plan(out, hf_model, trust_remote_code)
    steps = [printable(step.what) for step in plan.steps]

    def tell(text: str, file: TextIO | None = None) -> None:
        if not as_json:
            click.echo(text, file=file)

    def finish(repaired: bool) -> None:
        if as_json:
            document = describe(examine(out)) | {"steps": steps, "repaired": repaired}
            click.echo(json.dumps(document, indent=2))

    if not steps:
        tell(f"{out} is a release checkpoint. There is nothing to repair.")
        return finish(repaired=False)
    tell(f"{'Would repair' if dry_run else 'Repairing'} {out}:")
    if dry_run:
        for number, step in enumerate(steps, 1):
            tell(f"  {number}. {step}")
        return finish(repaired=False)
    numbers = iter(range(1, len(steps) + 1))
    with quiet(ctx.obj) as terminal:
        repair.run(plan, lambda step: tell(f"  {next(numbers)}. {printable(step.what)}", terminal.out))
    found = examine(out)
    if wrong := problems(found):
        raise click.ClickException(
            f"{out} still has a problem after the repair: {printable(wrong[0].what)} "
            f"Run megatron-bridge inspect {out} to see it."
        )
    if as_json:
        return finish(repaired=True)
    click.echo("Done.\n")
    show_flags(found)
