# SPDX-License-Identifier: Apache-2.0
"""The subcommand `export`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from megatron.bridge.cli.command import CHECKPOINT, TRUST, Command
from megatron.bridge.cli.deferred import lean_imports
from megatron.bridge.cli.terminal import folder_size, progress, quiet
from megatron.bridge.cli.text import human_bytes, printable
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG
from megatron.bridge.release_checkpoint.problems import problems


@click.command("export", cls=Command)
@CHECKPOINT
@click.argument("hf_out", type=click.Path(path_type=Path))
@click.option(
    "--hf-model",
    metavar="MODEL",
    help="Take the configuration from this Hugging Face model, a name on the hub or a folder: the one that was "
    f"imported. Default: the model that {RUN_CONFIG} names.",
)
@TRUST
@click.pass_context
def command(ctx: click.Context, out: Path, hf_out: Path, hf_model: str | None, trust_remote_code: bool) -> None:
    """Export the checkpoint at OUT, imported or trained, as a Hugging Face model at HF_OUT.

    HF_OUT must not exist, or be an empty folder. It appears when it is complete.
    """
    if hf_out.exists() and (not hf_out.is_dir() or any(hf_out.iterdir())):
        raise click.ClickException(
            f"{hf_out} exists; expected no such path, or an empty folder. Pass a different output path."
        )
    found = examine(out)
    if found.payload is None or found.payload.damage:
        raise click.ClickException(f"{out} can't be loaded: {printable(problems(found)[0].what)}")
    hf_out.parent.mkdir(parents=True, exist_ok=True)
    partial = hf_out.with_name(f"{hf_out.name}.incomplete")
    with (
        quiet(ctx.obj) as terminal,
        _removed_on_error(partial),
        progress(terminal, f"Exporting {out}", lambda: folder_size(partial)),
    ):
        with lean_imports():
            from megatron.bridge import AutoBridge

        source = hf_model or _imported_from(out)
        options = {"trust_remote_code": True} if trust_remote_code else {}
        bridge = AutoBridge.from_hf_pretrained(source, **options)
        bridge.export_ckpt(out, partial, show_progress=False, source_path=hf_model)
        if hf_out.exists():
            hf_out.rmdir()
        partial.rename(hf_out)
    click.echo(f"Wrote {hf_out}: a Hugging Face model, {human_bytes(folder_size(hf_out))}.")


def _imported_from(out: Path) -> str:
    """Return the Hugging Face model that `run_config.yaml` names."""
    from megatron.bridge.training.utils.checkpoint_utils import get_hf_model_id_from_checkpoint

    source = get_hf_model_id_from_checkpoint(str(out))
    if source is None:
        raise ValueError(f"{out} doesn't name the Hugging Face model that it came from. Pass it with --hf-model.")
    return source


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Clear a folder of what a killed export left, and of what this one leaves if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
