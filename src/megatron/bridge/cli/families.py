# SPDX-License-Identifier: Apache-2.0
"""The subcommand `families`. It imports neither torch nor Megatron Core."""

import json

import click

from megatron.bridge.cli.command import JSON, Command
from megatron.bridge.models.conversion.family_results import RESULTS


@click.command("families", cls=Command)
@click.argument("name", default="")
@JSON
def command(name: str, as_json: bool) -> None:
    """List the architectures that can be converted.

    Each is listed with the result of a conversion on a host without a GPU. The config.json of a model names its
    architecture under "architectures". NAME selects the architectures with this text in their names. Default: all.
    """
    found = {each: result for each, result in sorted(RESULTS.items()) if name.lower() in each.lower()}
    if not found:
        raise click.ClickException(
            f"No architecture has {name!r} in its name; expected one of {len(RESULTS)}. Run it without a name."
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for each, result in found.items():
        click.echo(f"{each:{width}}  {result}")
