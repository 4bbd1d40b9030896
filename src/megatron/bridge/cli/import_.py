# SPDX-License-Identifier: Apache-2.0
"""The subcommand `import`."""

import json
from pathlib import Path
from typing import Any

import click

from megatron.bridge.cli.command import CACHE_DIR, DTYPE, JSON, OUT, TOKEN, TRUST, Command, module, set_hub
from megatron.bridge.cli.ranks import PROCESSES, in_processes
from megatron.bridge.cli.show import describe, show_flags
from megatron.bridge.cli.terminal import folder_size, progress, quiet, staged_size
from megatron.bridge.cli.text import human_bytes, notes_of
from megatron.bridge.host import processes as ranks
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import ITERATION_0, LAYOUT_VARIABLE, RELEASE
from megatron.bridge.release_checkpoint.target import check_space
from megatron.bridge.utils.deferred import lean_imports


@click.command("import", cls=Command)
@click.argument("hf_model")
@OUT
@DTYPE
@click.option(
    "--adapter",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Merge this LoRA adapter of PEFT into HF_MODEL, its base model. Default: merge none.",
)
@click.option(
    "--from-megatron",
    is_flag=True,
    help="Read HF_MODEL as a checkpoint of Megatron-LM, in the format torch, torch_dcp, or torch_dist.",
)
@click.option("--revision", metavar="NAME", help="Download this branch, tag, or commit from the hub. Default: main.")
@TOKEN
@CACHE_DIR
@click.option("--overwrite", is_flag=True, help="Replace a release checkpoint at OUT. Default: stop if there is one.")
@click.option(
    "--link-iter-0",
    is_flag=True,
    help=f"Add a symbolic link {ITERATION_0} to the release checkpoint, for scripts that look for this folder.",
)
@click.option(
    "--layout",
    type=click.Choice([RELEASE, "iter"]),
    default=RELEASE,
    envvar=LAYOUT_VARIABLE,
    show_default=True,
    show_envvar=True,
    help=f"Write a release checkpoint, or {ITERATION_0} with the tracker 0, which Megatron-LM can't fine-tune from.",
)
@click.option(
    "--no-strict",
    is_flag=True,
    help="Leave out tensors that the Megatron model has no place for, and ignore keys of config.json that it doesn't "
    "follow, with a warning. Default: stop at them.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Before the checkpoint is published, compare Megatron-LM's logits with those of transformers, for the whole "
    "model if it fits in memory. Default: compare a small twin of the model if its kind of config was never compared.",
)
@PROCESSES
@TRUST
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    hf_model: str,
    out: Path,
    dtype: str | None,
    adapter: Path | None,
    from_megatron: bool,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    overwrite: bool,
    link_iter_0: bool,
    layout: str,
    no_strict: bool,
    verify: bool | None,
    processes: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Import a Hugging Face model as a release checkpoint.

    HF_MODEL is a folder or a name on the hub. OUT must not contain training checkpoints. An existing release
    checkpoint is replaced only with --overwrite.
    """
    folder = Path(hf_model)
    release = layout == RELEASE
    others = {"--dtype": dtype, "--adapter": adapter, "--no-strict": no_strict, "--layout iter": not release}
    others |= {"--verify": verify, "--trust-remote-code": trust_remote_code}
    if from_megatron and (given := next((flag for flag, value in others.items() if value), None)):
        raise click.UsageError(f"--from-megatron copies the weights as they are; found {given}. Drop one of the two.")
    if link_iter_0 and not release:
        raise click.UsageError("--link-iter-0 needs the layout release; found --layout iter. Drop one of the two.")
    _check(hf_model, out, release, overwrite, "checkpoint of Megatron-LM" if from_megatron else "Hugging Face model")
    if not folder.is_dir() and not from_megatron:
        set_hub(token, cache_dir)
        expected = _size(module("utils.hub").download(hf_model, revision))
    else:
        expected = _megatron_size(folder) if from_megatron else _size(folder)
    check_space(out, expected)
    if in_processes(ctx, processes):
        return

    def written() -> int:
        return staged_size(out / RELEASE) if release else folder_size(out / ITERATION_0)

    with (
        quiet(ctx.obj) as terminal,
        notes_of("megatron.bridge.models.conversion.streaming.plan", terminal.note) as notes,
        progress(terminal, f"Importing {hf_model}", written, expected),
    ):
        with lean_imports():
            import torch

            from megatron.bridge.models.conversion import layout_families

            layout_families.install_for(hf_model)
            from megatron.bridge import AutoBridge

        options: dict[str, Any] = {"release": release, "link_iter_0": link_iter_0}
        if dtype:
            options["torch_dtype"] = getattr(torch, dtype)
        if adapter is not None:
            options["adapter"] = adapter
        if revision is not None:
            options["revision"] = revision
        if no_strict:
            options["strict"] = False
        if verify is not None:
            options["verify"] = verify
        if trust_remote_code:
            options["trust_remote_code"] = True
        if from_megatron:
            module("models.conversion.from_megatron").import_megatron_lm(folder, out, link_iter_0)
        else:
            AutoBridge.import_ckpt(hf_model, out, **options)
    if not ranks.is_first():
        return
    found = examine(out)
    if as_json:
        document = describe(found)
        document |= {"notes": [*notes, *document["notes"]], "warnings": terminal.warnings}
        click.echo(json.dumps(document, indent=2))
        return
    if (payload := found.payload) is None:
        raise click.ClickException(f"{out} was removed by another process. Import the model again.")
    what = "a release checkpoint" if release else f"{ITERATION_0}, the layout before release checkpoints"
    click.echo(f"Wrote {out}: {what}, {payload.parameters:,} parameters, {human_bytes(payload.size)}.\n")
    if release:
        show_flags(found)
    else:
        click.echo(
            f"Megatron-LM can't fine-tune from it. To make it a release checkpoint, run: megatron-bridge repair {out}"
        )


def _size(folder: Path) -> int:
    """Return the bytes of the weights in the folder of a Hugging Face model."""
    files = [*folder.glob("*.safetensors")] or folder.glob("pytorch_model*.bin")
    return sum(file.stat().st_size for file in files)


def _megatron_size(folder: Path) -> int:
    """Return the bytes of the weights of a checkpoint of Megatron-LM, without its optimizer."""
    payload = examine(folder).payload
    if payload is None:
        raise click.ClickException(f"{folder} holds no checkpoint of Megatron-LM. Pass its root, or a payload folder.")
    return (payload.parameters or 0) * (2 if payload.dtypes[:1] in (["bfloat16"], ["float16"]) else 4)


def _check(source: str, out: Path, release: bool, overwrite: bool, what: str) -> None:
    """Refuse what the import itself would refuse only after it has imported torch."""
    looks_like_path = source.startswith((".", "/", "~")) or len(Path(source).parts) > 2
    if looks_like_path and not Path(source).is_dir():
        raise click.ClickException(
            f"{source} is not a folder; expected a {what}. Pass its folder, or a name on the hub."
        )
    found = examine(out)
    if found.kind == "file":
        raise click.ClickException(f"{out} is a file; expected a directory. Pass a different output path.")
    if found.kind == "payload":
        raise click.ClickException(
            f"{out} is a payload folder of a checkpoint; expected a root. Pass {out.parent}, or a different path."
        )
    if found.iteration > 0:
        raise click.ClickException(
            f"{out} holds training iteration {found.iteration}; expected no training checkpoint, which a release "
            "checkpoint would hide. Pass a different output path."
        )
    if (out / RELEASE).exists() and not overwrite:
        raise click.ClickException(
            f"{out} holds a release checkpoint. Pass --overwrite to replace it, or a different output path."
        )
    if not release and (out / ITERATION_0).exists() and not overwrite:
        raise click.ClickException(f"{out} holds {ITERATION_0}. Pass --overwrite to replace it, or a different path.")
