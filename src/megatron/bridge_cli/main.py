# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`: import, inspect, repair, export.

This module and what `inspect` needs import neither torch nor `megatron.bridge`; the other commands import them when
they run.
"""

import errno
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click

from megatron.bridge_cli import repair as repairing
from megatron.bridge_cli.checkpoint import FORMS, ITERATION_0, RELEASE, RUN_CONFIG, STAGING, Checkpoint, examine
from megatron.bridge_cli.verdicts import Verdict, grouped, launch_flags, problems, verdicts


def _read_from(ctx: click.Context, parameter: click.Parameter, out: Path) -> Path:
    """Take `iter_0000000` that isn't there for the release beside it, as Bridge's readers do."""
    release = out.with_name(RELEASE)
    if out.name != ITERATION_0 or os.path.lexists(out) or not (release / "metadata.json").is_file():
        return out
    click.echo(
        f"Note: {_printable(str(out))} is not there, taking the release checkpoint beside it: "
        f"use {_printable(str(release))}",
        err=True,
    )
    return release


OUT = click.argument("out", type=click.Path(path_type=Path))
CHECKPOINT = click.argument("out", type=click.Path(path_type=Path), callback=_read_from)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else to stdout.")
HF_MODEL = "A Hugging Face model: a name on the hub, or a folder."
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the Hugging Face model.")
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, help="Show the traceback of an error, and what packages print."
)


class _Command(click.Command):
    """Tells an error in one line, unless --verbose asks for all of it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        VERBOSE(self)
        self.params += self.__dict__.pop("__click_params__", [])

    def invoke(self, ctx: click.Context) -> Any:
        verbose = ctx.params.pop("verbose")
        ctx.obj = verbose
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            if verbose:
                raise
            raise click.ClickException(_in_one_line(error)) from None


class _Group(click.Group):
    command_class = _Command


_REMEDIES = {
    errno.ENOSPC: "free space there, and run the command again",
    errno.EDQUOT: "free space there or have your quota raised, and run the command again",
    errno.EFBIG: "raise the limit of `ulimit -f`, and run the command again",
    errno.EROFS: "mount it for writing, or choose another path",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions or its owner, or choose another path",
    errno.ESTALE: "mount it again, and run the command again",
    errno.EIO: "check the disk, and run the command again",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of `ulimit -n`, and run the command again",
}
"""What to do where the system says no, in whatever command."""


def _in_one_line(error: Exception) -> str:
    text = _printable(" ".join(str(error).split())) or "no message"
    if isinstance(error, OSError) and error.errno:
        what = _printable(" ".join(str(error.strerror).split()))
        if error.strerror == os.strerror(error.errno):
            where = "" if error.filename is None else f"{_printable(os.fsdecode(error.filename))}: "
            remedy = _REMEDIES.get(error.errno)
            what = f"{where}{what}{f': {remedy}' if remedy else '; --verbose shows where'}"
    # An error of ours ends with what to do.
    elif isinstance(error, repairing.Refused) or isinstance(error, (ValueError, OSError)) and ": " in text:
        what = text
    else:
        what = f"{type(error).__name__}: {text}; --verbose shows where"
    return what if len(what) < 600 else f"{what[:600]} …"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Convert checkpoints between Hugging Face and Megatron-LM, look at them, and mend them."""
    # A batch system ends a job so, and what is half-written shall go then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@main.command()
@CHECKPOINT
@JSON
def inspect(out: Path, as_json: bool) -> None:
    """Say what lies at OUT, who can load it, and with which flags. The exit code is 1 if something is wrong.

    OUT is a checkpoint root or one of its folders. Only metadata is read: neither weights nor pickles that could run.
    """
    found = examine(out)
    with _notes_of_flags() as notes:
        document = describe(found)
    document["notes"] = notes
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)
    sys.exit(0 if document["ok"] else 1)


@main.command()
@CHECKPOINT
@click.option("--dry-run", is_flag=True, help="Print the plan and change nothing.")
@click.option("--hf-model", metavar="MODEL", help=f"Where to take the args from, if not from {RUN_CONFIG}. {HF_MODEL}")
@TRUST
@click.pass_context
def repair(ctx: click.Context, out: Path, dry_run: bool, hf_model: str | None, trust_remote_code: bool) -> None:
    """Turn the checkpoint at OUT into a release checkpoint, which Megatron-LM trains from.

    It mends what import_ckpt of Megatron-Bridge up to 0.6 wrote (tracker 0, iter_0000000, no args), what was half
    mended by hand, and what a killed import left. No weight is read or copied. A checkpoint of a training is refused.
    """
    plan = repairing.plan(out, hf_model, trust_remote_code)
    if not plan.steps:
        click.echo(f"{out} is a release checkpoint, there is nothing to repair.")
        return
    click.echo(f"{'Would repair' if dry_run else 'Repairing'} {out}:")
    if dry_run:
        for number, step in enumerate(plan.steps, 1):
            click.echo(f"  {number}. {_printable(step.what)}")
        return
    numbers = iter(range(1, len(plan.steps) + 1))
    with _quiet(ctx.obj) as terminal:
        repairing.run(plan, lambda step: click.echo(f"  {next(numbers)}. {_printable(step.what)}", file=terminal.out))
    found = examine(out)
    if wrong := problems(found):
        raise click.ClickException(
            f"{out} is not whole yet: {_printable(wrong[0].what)}; run megatron-bridge inspect {out}"
        )
    click.echo("Done.\n")
    _show_flags(found)


@main.command("import")
@click.argument("hf_model")
@OUT
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of the weights; as they are.")
@click.option("--overwrite", is_flag=True, help="Replace a release checkpoint that is at OUT.")
@click.option(
    "--link-iter-0",
    is_flag=True,
    help=f"Leave a symbolic link {ITERATION_0} to the release checkpoint, for scripts that look for this folder.",
)
@click.option(
    "--layout",
    type=click.Choice([RELEASE, "iter"]),
    default=RELEASE,
    envvar="MEGATRON_BRIDGE_CHECKPOINT_LAYOUT",
    show_default=True,
    show_envvar=True,
    help=f"Write a release checkpoint, or {ITERATION_0} with the tracker 0, which Megatron-LM can't fine-tune from.",
)
@TRUST
@JSON
@click.pass_context
def import_(
    ctx: click.Context,
    hf_model: str,
    out: Path,
    dtype: str | None,
    overwrite: bool,
    link_iter_0: bool,
    layout: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Turn the Hugging Face model HF_MODEL, a name or a folder, into a release checkpoint at OUT.

    A checkpoint of a training at OUT is refused in any case, a release is unless --overwrite is given.
    """
    folder = Path(hf_model)
    release = layout == RELEASE
    if link_iter_0 and not release:
        raise click.UsageError(
            "--link-iter-0 makes a link to a release checkpoint, the layout iter has none: drop one"
        )
    _check_import(folder, out, release, overwrite)
    expected = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    staged = out / (STAGING if release else ITERATION_0)
    with (
        _quiet(ctx.obj) as terminal,
        _notes_of("megatron.bridge.models.conversion.streaming_import", terminal.note) as notes_of_import,
        _progress(terminal, f"Importing {hf_model}", lambda: _size(staged), expected),
    ):
        from megatron.bridge_cli.lean_import import auto_bridge_for

        AutoBridge = auto_bridge_for(hf_model)
        import torch

        options = {"release": release, "link_iter_0": link_iter_0}
        if dtype:
            options["torch_dtype"] = getattr(torch, dtype)
        if trust_remote_code:
            options["trust_remote_code"] = True
        AutoBridge.import_ckpt(hf_model, out, **options)
    found = examine(out)
    if as_json:
        with _notes_of_flags() as notes:
            document = describe(found)
        document |= {"notes": [*notes_of_import, *notes], "warnings": terminal.warnings}
        click.echo(json.dumps(document, indent=2))
        return
    payload = found.payload
    what = "a release checkpoint" if release else f"{ITERATION_0}, the layout before release checkpoints"
    click.echo(f"Wrote {out}: {what}, {payload.parameters:,} parameters, {_bytes(payload.size)}.\n")
    if release:
        _show_flags(found)
    else:
        click.echo(
            f"Megatron-LM can't fine-tune from it. To make it a release checkpoint: megatron-bridge repair {out}"
        )


def _imported_from(out: Path) -> str:
    """Return the Hugging Face model that `run_config.yaml` names."""
    from megatron.bridge.training.utils.checkpoint_utils import get_hf_model_id_from_checkpoint

    source = get_hf_model_id_from_checkpoint(str(out))
    if source is None:
        raise ValueError(f"{out} does not say which Hugging Face model it came from: give --hf-model")
    return source


def _check_import(source: Path, out: Path, release: bool, overwrite: bool) -> None:
    """Refuse, before anything is loaded, what an import would refuse after ten seconds."""
    looks_like_path = str(source).startswith((".", "/", "~")) or len(source.parts) > 2
    if looks_like_path and not source.is_dir():
        raise click.ClickException(
            f"{source} is not a folder: give that of a Hugging Face model, or a name on the hub"
        )
    found = examine(out)
    if found.kind == "file":
        raise click.ClickException(f"{out} is a file, a checkpoint needs a folder: give another path")
    if found.kind == "payload":
        raise click.ClickException(f"{out} is a folder of a checkpoint: give its root, or another path")
    if found.iteration > 0:
        raise click.ClickException(
            f"{out} holds training iteration {found.iteration}, a release would hide it: give another path"
        )
    if (out / RELEASE).exists() and not overwrite:
        raise click.ClickException(f"{out} holds a release checkpoint: give --overwrite, or another path")
    if not release and (out / ITERATION_0).exists() and not overwrite:
        raise click.ClickException(f"{out} holds {ITERATION_0}: give --overwrite, or another path")


@main.command()
@CHECKPOINT
@click.argument("hf_out", type=click.Path(path_type=Path))
@click.option(
    "--hf-model", metavar="MODEL", help=f"What was imported. Default: the one that {RUN_CONFIG} names. {HF_MODEL}"
)
@TRUST
@click.pass_context
def export(ctx: click.Context, out: Path, hf_out: Path, hf_model: str | None, trust_remote_code: bool) -> None:
    """Turn the checkpoint at OUT, imported or trained, into a Hugging Face model at HF_OUT."""
    if hf_out.exists() and (not hf_out.is_dir() or any(hf_out.iterdir())):
        raise click.ClickException(f"{hf_out} is there already: give another path")
    found = examine(out)
    if found.payload is None or found.payload.damage:
        raise click.ClickException(f"{out} can't be loaded: {_printable(problems(found)[0].what)}")
    hf_out.parent.mkdir(parents=True, exist_ok=True)
    partial = hf_out.with_name(f"{hf_out.name}.incomplete")
    with (
        _quiet(ctx.obj) as terminal,
        _removed_on_error(partial),
        _progress(terminal, f"Exporting {out}", lambda: _size(partial)),
    ):
        from megatron.bridge import AutoBridge

        source = hf_model or _imported_from(out)
        options = {"trust_remote_code": True} if trust_remote_code else {}
        bridge = AutoBridge.from_hf_pretrained(source, **options)
        bridge.export_ckpt(out, partial, show_progress=False, source_path=hf_model)
        if hf_out.exists():
            hf_out.rmdir()
        partial.rename(hf_out)
    click.echo(f"Wrote {hf_out}: a Hugging Face model, {_bytes(_size(hf_out))}.")


# --- documents -------------------------------------------------------------------------------------------------------


def describe(found: Checkpoint) -> dict[str, Any]:
    """Return what `inspect --json` prints, of plain values."""
    payload = found.payload
    wrong = problems(found)
    return {
        "path": str(found.root),
        "ok": not wrong,
        "tracker": found.tracker,
        "layout": found.layout,
        "folders": found.folders,
        "link": found.link,
        "leftovers": found.leftovers,
        "payload": payload
        and {
            "folder": payload.path.name,
            "format": payload.format,
            "core": payload.core,
            "common_state": payload.common,
            "iteration": payload.iteration,
            "optimizer": payload.has_optimizer,
            "args": vars(payload.args) if payload.args else None,
            "parallelism": payload.parallelism,
            "parameters": payload.parameters,
            "dtypes": payload.dtypes,
            "bytes": payload.size,
            "run_config": payload.has(RUN_CONFIG),
        },
        "problems": [{"what": each.what, "repairable": each.repairable} for each in wrong],
        "repair": _repair_command(found) if any(each.repairable for each in wrong) else None,
        "readers": [{"reader": each.reader, "loads": each.loads, "why": each.why} for each in verdicts(found)],
        "flags": launch_flags(found),
    }


def _repair_command(found: Checkpoint) -> list[str] | None:
    plan = repairing.foresee(found)
    if plan is None:
        return None
    return ["megatron-bridge", "repair", str(plan.root), *(["--hf-model", plan.hf_model] if plan.hf_model else [])]


def _notes_of_flags() -> AbstractContextManager[list[str]]:
    """Collect what the table of flags warns of."""
    return _notes_of("megatron.bridge_cli.launch_flags")


@contextmanager
def _notes_of(name: str, tell: Callable[[str], None] = lambda note: None) -> Iterator[list[str]]:
    """Collect the lines that a module logs, from info on, each once, and tell it then."""
    notes: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        note = record.getMessage()
        if note not in notes:
            notes.append(note)
            tell(note)

    handler = logging.Handler()
    handler.emit = emit
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


def _show(document: dict[str, Any]) -> None:
    """Print what `inspect` found, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(document):
        facts.add_row(name, value)
    console.print(facts)
    readers = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    readers.add_column("reader", overflow="fold")
    readers.add_column("loads", no_wrap=True)
    readers.add_column("why", overflow="fold")
    colours = {"yes": "green", "partly": "yellow", "unknown": "yellow", "no": "red"}
    for each in grouped([Verdict(**reader) for reader in document["readers"]]):
        readers.add_row(each.reader, f"[{colours[each.loads]}]{each.loads}[/]", _escaped(each.why))
    console.print(readers)
    for problem in document["problems"]:
        console.print(f"[red]✗[/] {_escaped(problem['what'])}", soft_wrap=True)
    if document["repair"]:
        console.print(f"\nRepair it with: {_escaped(shlex.join(document['repair']))}", soft_wrap=True)
    if not document["problems"]:
        console.print("[green]✓[/] All is well.\n")
    if document["flags"] is not None and not document["problems"]:
        _print_flags(document["flags"], document["notes"])


def _facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the facts of a checkpoint, a line each."""
    yield "path", _escaped(document["path"])
    payload = document["payload"]
    if document["payload"] is None and not document["tracker"]:
        return
    yield "tracker", _escaped(document["tracker"]) if document["tracker"] is not None else "none"
    folders = [*document["folders"], *document["leftovers"]]
    if payload:
        folders = [f"{name} (shown here)" if name == payload["folder"] and folders[1:] else name for name in folders]
    if document["link"] is not None:
        folders.append(f"{ITERATION_0} (a link to {_escaped(document['link'])})")
    yield "folders", ", ".join(folders) or "none"
    if payload is None:
        return
    yield "format", f"{payload['format'] or 'unknown'}, written by Megatron Core {payload['core'] or '(unknown)'}"
    if payload["common_state"]:
        forms = FORMS.values() if payload["common_state"] == "both" else [FORMS[payload["common_state"]]]
        yield "common state", f"in {' and in '.join(forms)}"
    args = payload["args"]
    yield "args", f"{len(args)} fields" if args else "none"
    if args:
        sizes = payload["parallelism"] or {}
        yield "saved with", ", ".join(f"{letters} {size}" for letters, size in sizes.items()) or "unknown"
    if payload["optimizer"] or payload["iteration"]:
        state = "with" if payload["optimizer"] else "without"
        yield "training", f"iteration {payload['iteration']}, {state} optimizer state"
    if payload["parameters"] is not None:
        yield "parameters", f"{payload['parameters']:,} in {', '.join(payload['dtypes'])}"
    yield "size", _bytes(payload["bytes"])


def _show_flags(found: Checkpoint) -> None:
    with _notes_of_flags() as notes:
        flags = launch_flags(found)
    if flags is not None:
        _print_flags(flags, notes)


def _print_flags(flags: dict[str, list[str]], notes: list[str]) -> None:
    click.echo("Megatron-LM starts from it with:")
    click.echo(f"  {shlex.join(flags['use_checkpoint_args'])}")
    click.echo("or, without --use-checkpoint-args, with:")
    click.echo(f"  {shlex.join(flags['without'])}")
    for note in dict.fromkeys(notes):
        click.echo(f"Note: {note}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(_printable(text))


def _printable(text: str) -> str:
    """Return a text that may come from a hostile file, without what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _bytes(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000
    return f"{size:.4g} TB"


def _size(folder: Path) -> int:
    """Return the bytes in a folder that may grow, move or vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


# --- terminal --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Terminal:
    """What this command itself prints to, while `_quiet` keeps the rest away.

    Attributes:
        out: Standard output.
        err: Standard error.
        verbose: All of it is shown.
        warnings: What Bridge has warned of.
    """

    out: TextIO
    err: TextIO
    verbose: bool
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Print a note, in the place of the bar if there is one, which is drawn again below it."""
        bar = "\r\033[K" if self.err.isatty() else ""
        click.echo(f"{bar}Note: {_printable(text)}", file=self.err)


@contextmanager
def _quiet(verbose: bool) -> Iterator[_Terminal]:
    """Keep from the terminal what imported packages print; with `verbose`, send all of it to stderr.

    What Bridge warns of is printed in the end, whether it went well or not.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = _Terminal(_own(sys.stdout, 1), _own(sys.stderr, 2), verbose)
    kept = [os.dup(1), os.dup(2)]
    try:
        with nullcontext(terminal.err) if verbose else open(os.devnull, "w") as sink:
            target = 2 if verbose else sink.fileno()
            os.dup2(target, 1)
            os.dup2(target, 2)
            with redirect_stdout(sink), redirect_stderr(sink), _warnings_into(terminal.warnings):
                yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for warning in terminal.warnings:
            click.echo(f"Warning: {warning}", err=True)


@contextmanager
def _warnings_into(warnings: list[str]) -> Iterator[None]:
    """Collect what Bridge warns of, each once and in one line."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = _printable(" ".join(record.getMessage().split()))
            if line not in warnings:
                warnings.append(line)

    handler = Collector(logging.WARNING)
    # Of models and checkpoints; megatron.bridge.utils tells which kernels a host lacks, which no conversion needs.
    loggers = [logging.getLogger(f"megatron.bridge.{name}") for name in ("models", "training")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _own(stream: TextIO, number: int) -> TextIO:
    """Return a stream that writes where this one does, even after its descriptor is given to another file."""
    try:
        shared = stream.fileno() == number
    except (OSError, ValueError):
        shared = False
    return os.fdopen(os.dup(number), "w", buffering=1) if shared else stream


@contextmanager
def _progress(terminal: _Terminal, what: str, size: Callable[[], int], expected: int = 0) -> Iterator[None]:
    """Show a bar of the bytes that are written, where a person looks on."""
    if terminal.verbose or not terminal.err.isatty():
        yield
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(
        *columns,
        console=Console(file=terminal.err, highlight=False),
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    done = threading.Event()
    task = bar.add_task(what, total=expected or None)

    def follow() -> None:
        while not done.wait(0.25):
            bar.update(task, completed=min(size(), expected or sys.maxsize))

    with bar:
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Clear the folder of what a killed export left, and of what this one leaves if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


if __name__ == "__main__":
    main(prog_name="megatron-bridge")
