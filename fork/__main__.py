# SPDX-License-Identifier: Apache-2.0
"""The command line of the machinery: `python -m fork --help`."""

from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from fork import adopt as adoption
from fork import backend, measure, pull_request, release, stack
from fork import diff as differ
from fork import kit as offline_kit
from fork.errors import ForkError
from fork.upstream import LATEST, RELEASES


OUT = click.option(
    "--out", default="dist", type=click.Path(file_okay=False, path_type=Path), help="Folder for the result."
)
CHANGES = click.option("--change", "names", multiple=True, help="Only this change of the stack; can be repeated.")


class _Group(click.Group):
    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except ForkError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group)
def main() -> None:
    """Fetch an upstream version of Megatron-Bridge, lay the stack of changes over it, pack the wheel."""


@main.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@CHANGES
def apply(root: Path, names: tuple[str, ...]) -> None:
    """Lay the stack over ROOT, an unpacked wheel or a checkout of Megatron-Bridge."""
    changes = stack.load(names=names)
    touched = stack.apply(changes, root)
    for change in changes:
        count = sum(change.name in touching for touching in touched.values())
        click.echo(f"{change.name}: {count} file{'s' * (count != 1)}")


def _release_options(command: Callable) -> Callable:
    """The options of a command that lays the stack over an upstream version."""
    for option in (
        click.option(
            "--upstream-wheel",
            envvar=backend.WHEEL_VARIABLE,
            type=click.Path(path_type=Path),
            help="Upstream's wheel, for a host without network.",
        ),
        click.option("--upstream", default=LATEST.version, type=click.Choice(list(RELEASES)), help="The release."),
    ):
        command = option(command)
    return command


@main.command()
@_release_options
@OUT
def build(out: Path, upstream: str, upstream_wheel: Path | None) -> None:
    """Build the patched wheel."""
    click.echo(backend.build(out, RELEASES[upstream], upstream_wheel))


@main.command()
@_release_options
@OUT
@CHANGES
def diff(out: Path, upstream: str, upstream_wheel: Path | None, names: tuple[str, ...]) -> None:
    """Print the unified diff of the patched tree against an upstream version, and write it to a file."""
    path = differ.write(out, RELEASES[upstream], upstream_wheel, stack.load(names=names))
    click.echo(f"wrote {path}", err=True)


@main.command("stack")
@_release_options
def show_stack(upstream: str, upstream_wheel: Path | None) -> None:
    """Print the changes of the stack with their sizes, and fail if one is above its limit."""
    sizes = measure.measure(RELEASES[upstream], upstream_wheel)
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    console.print(measure.table(sizes))
    if found := measure.problems(sizes):
        raise ForkError("\n".join(found))


@main.command("release")
@click.option(
    "--out",
    default=Path("dist", "release"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the wheels.",
)
@click.option("--tag", default=release.TAG, help="The tag that is released.")
def make_release(out: Path, tag: str) -> None:
    """Build a wheel over each upstream version, with checksums and notes."""
    for wheel in release.make(out, tag):
        click.echo(wheel)


@main.command("kit")
@click.option(
    "--wheel",
    default=Path("dist", f"{backend.stem(LATEST)}-py3-none-any.whl"),
    type=click.Path(path_type=Path),
    help="The patched wheel.",
)
@click.option(
    "--out", default=Path("dist", "kit"), type=click.Path(file_okay=False, path_type=Path), help="Folder for the kit."
)
@click.option("--tool", "tools", multiple=True, help="A requirement of the tests' tools; can be repeated.")
@click.option("--part-size", metavar="SIZE", help="Cut the kit into parts of at most this size, such as 60M.")
@click.option("--transformer-engine", is_flag=True, help="Add Transformer Engine for CUDA 13.")
def make_kit(out: Path, wheel: Path, tools: tuple[str, ...], part_size: str | None, transformer_engine: bool) -> None:
    """Make the offline kit, of packages that are installed here."""
    size = offline_kit.parse_size(part_size) if part_size else None
    click.echo(offline_kit.report(offline_kit.make(out, wheel, tools, size, transformer_engine)))
    click.echo(f"{out}: copy it to the host, and run {out.name}/run.sh there")


@main.command()
@click.argument("version")
@click.option("--megatron-core", help="The Megatron Core that goes with it, unless it is the one that is found.")
@click.option("--transformers", help="The transformers that goes with it, unless it is the one that is found.")
@click.option("--upstream-wheel", type=click.Path(path_type=Path), help="Upstream's wheel, if it is here already.")
def adopt(version: str, megatron_core: str | None, transformers: str | None, upstream_wheel: Path | None) -> None:
    """Find out whether the stack fits a new upstream version, and add it to the table if it does."""
    upstream = RELEASES.get(version) or adoption.look_up(version, megatron_core, transformers)
    click.echo(f"fork/upstream.py:\n{upstream.line}")
    told = adoption.misplaced(upstream, upstream_wheel)
    if told:
        click.echo("\n".join(told))
        raise ForkError(
            f"{len(told)} edits don't find their place in megatron-bridge {version}; adjust them in changes/, and say "
            "which releases they are for only where upstream truly differs"
        )
    adoption.add_line(upstream)
    click.echo(f"every edit finds its place in megatron-bridge {version}")


@main.command("pull-request")
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@CHANGES
@click.option("--branch", help="Name of the new branch; that of the change, or release-stack for several.")
@click.option(
    "--out",
    default=Path("dist", "pull_request"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the patches and the texts.",
)
@click.option(
    "--check", metavar="PYTHON", type=click.Path(exists=True, path_type=Path), help="Test each commit with it."
)
def make_pull_request(
    checkout: Path, names: tuple[str, ...], branch: str | None, out: Path, check: Path | None
) -> None:
    """Commit the stack on a new branch of CHECKOUT, a clean checkout of Megatron-Bridge."""
    changes = stack.load(names=names)
    branch = branch or (changes[0].name if len(changes) == 1 else "release-stack")
    commits = pull_request.make(checkout, changes, branch, out, check=check)
    for change in changes:
        if change not in [commit.change for commit in commits]:
            click.echo(f"{change.name}: {checkout} has it already")
    click.echo(f"\n{pull_request.table(commits)}")
    click.echo(f"{len(commits)} on the branch {branch} of {checkout}; patches and texts to paste in {out}")


if __name__ == "__main__":
    main(prog_name="python -m fork")
