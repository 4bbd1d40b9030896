# SPDX-License-Identifier: Apache-2.0
"""What the subcommands share: their arguments, and errors in one line."""

import errno
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click

from megatron.bridge.cli.text import printable
from megatron.bridge.host import processes
from megatron.bridge.release_checkpoint.layout import release_beside


def _read_from(ctx: click.Context, parameter: click.Parameter, out: Path) -> Path:
    """Return the release checkpoint beside an `iter_0000000` that doesn't exist, as Bridge's readers do."""
    release = release_beside(out)
    if release is None:
        return out
    shown, used = printable(str(out)), printable(str(release))
    click.echo(f"Note: {shown} does not exist. Using the release checkpoint beside it; pass {used} instead.", err=True)
    return release


QUIETLY = "megatron.bridge.cli.quiet"
OUT = click.argument("out", type=click.Path(path_type=Path))
CHECKPOINT = click.argument("out", type=click.Path(path_type=Path), callback=_read_from)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, to stdout.")
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the Hugging Face model.")
TOKEN = click.option(
    "--token", metavar="TOKEN", help="Use this token on the hub. Default: HF_TOKEN, or the one of `hf auth login`."
)
CACHE_DIR = click.option(
    "--cache-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Download models to this folder, which gets the layout of the hub's cache. Default: HF_HUB_CACHE.",
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Convert the weights to this dtype. Default: keep the checkpoint's dtype.",
)
ARGUMENTS = "megatron.bridge.arguments"
"""The key under which `ctx.meta` has the arguments of the subcommand."""
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, help="Show the traceback of an error, and the output of imported packages."
)
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print only warnings, errors, and the document of --json.")


def module(name: str) -> Any:
    """Import a module below megatron.bridge that only one option needs. It may come with a later change."""
    return importlib.import_module(f"megatron.bridge.{name}")


def set_hub(token: str | None, cache_dir: Path | None) -> None:
    """Set the token and cache of huggingface_hub, which reads these variables when it is imported."""
    found = {"HF_TOKEN": token, "HF_HUB_CACHE": cache_dir and str(cache_dir.absolute())}
    if click.get_current_context().meta.get(QUIETLY):
        found["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.update({name: value for name, value in found.items() if value})


class Command(click.Command):
    """A subcommand that reports an error in one line, or with its traceback if --verbose is given.

    `ctx.obj` is True with --verbose, and `ctx.meta[QUIETLY]` with --quiet, which discards stdout unless it is JSON.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        VERBOSE(self)
        QUIET(self)
        self.params += self.__dict__.pop("__click_params__", [])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and keep them for other processes."""
        ctx.meta[ARGUMENTS] = [ctx.info_name, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        verbose = ctx.params.pop("verbose")
        ctx.obj, ctx.meta[QUIETLY] = verbose, ctx.params.pop("quiet")
        try:
            with ExitStack() as stack:
                stack.enter_context(_silent_ranks(verbose))
                if ctx.meta[QUIETLY] and not ctx.params.get("as_json"):
                    stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                return super().invoke(ctx)
        except (click.exceptions.Exit, BrokenPipeError, SystemExit):
            raise
        except BaseException as error:
            if not processes.has_to_say(error):
                raise SystemExit(1) from None
            if verbose or isinstance(error, (click.ClickException, click.Abort, KeyboardInterrupt)):
                raise
            # PyTorch's CheckpointException is no Exception. It has the errors of all ranks.
            failures = getattr(error, "failures", None) or {None: (error,)}
            raise click.ClickException(_in_one_line(next(iter(failures.values()))[0])) from None


@contextmanager
def _silent_ranks(verbose: bool) -> Iterator[None]:
    """Discard the output of all ranks but the first, and hide GPUs from every rank. Errors are still printed."""
    if processes.in_group():
        processes.hide_accelerators()
    if processes.is_first() or verbose:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


_REMEDIES = {
    errno.ENOSPC: "Free space there, and run the command again.",
    errno.EDQUOT: "Free space there or have your quota raised, and run the command again.",
    errno.EFBIG: "Raise the limit of `ulimit -f`, and run the command again.",
    errno.EROFS: "Mount it for writing, or pass a different path.",
    errno.EACCES: "Change its permissions, or pass a different path.",
    errno.EPERM: "Change its permissions or its owner, or pass a different path.",
    errno.ESTALE: "Mount it again, and run the command again.",
    errno.EIO: "Check the disk, and run the command again.",
    errno.ENAMETOOLONG: "Pass a shorter path.",
    errno.EMFILE: "Raise the limit of `ulimit -n`, and run the command again.",
}
"""The next step after an error of the operating system, whatever the subcommand."""


def _in_one_line(error: BaseException) -> str:
    text = printable(" ".join(str(error).split())) or "no message"
    if isinstance(error, OSError) and error.errno:
        what = printable(" ".join(str(error.strerror).split()))
        if error.strerror == os.strerror(error.errno):
            where = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
            remedy = _REMEDIES.get(error.errno, "Pass --verbose to see where it happened.")
            what = f"{where}{what}. {remedy}"
    elif isinstance(error, (ValueError, OSError)) and (": " in text or _raised_by_bridge(error)):
        # The message already says what to do.
        what = text
    else:
        what = f"{type(error).__name__}: {text}. Pass --verbose to see where it happened."
    return what if len(what) < 600 else f"{what[:600]} …"


def _raised_by_bridge(error: BaseException) -> bool:
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = type(error).__module__, *frames[-1:]
    return any(module.startswith("megatron.bridge") for module in modules)
