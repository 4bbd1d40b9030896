# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m fork build` and `python -m fork apply DIR`."""

from pathlib import Path

import click

from fork import backend, stack
from fork.errors import ForkError
from fork.upstream import LATEST, RELEASES


class _Group(click.Group):
    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except ForkError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group)
def main() -> None:
    """Fetch a release of Megatron-Bridge, lay the stack of changes over it, pack the wheel."""


@main.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--change", "names", multiple=True, help="Only this change of the stack; can be repeated.")
def apply(root: Path, names: tuple[str, ...]) -> None:
    """Lay the stack over ROOT, an unpacked wheel or a checkout of Megatron-Bridge."""
    changes = stack.load(names=names)
    touched = stack.apply(changes, root)
    for change in changes:
        count = sum(change.name in touching for touching in touched.values())
        click.echo(f"{change.name}: {count} file{'s' * (count != 1)}")


@main.command()
@click.option("--out", default="dist", type=click.Path(file_okay=False, path_type=Path), help="Folder for the wheel.")
@click.option("--upstream", default=LATEST.version, type=click.Choice(list(RELEASES)), help="Release to build on.")
@click.option(
    "--upstream-wheel",
    envvar=backend.WHEEL_VARIABLE,
    type=click.Path(path_type=Path),
    help="Upstream's wheel, for a host without network.",
)
def build(out: Path, upstream: str, upstream_wheel: Path | None) -> None:
    """Build the patched wheel."""
    click.echo(backend.build(out, RELEASES[upstream], upstream_wheel))


if __name__ == "__main__":
    main(prog_name="python -m fork")
