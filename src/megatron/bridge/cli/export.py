# SPDX-License-Identifier: Apache-2.0
"""The subcommand `export`."""

import json
import re
from pathlib import Path
from typing import Any

import click

from megatron.bridge.cli.command import CHECKPOINT, DTYPE, JSON, TOKEN, TRUST, Command, module, set_hub
from megatron.bridge.cli.ranks import PROCESSES, in_processes
from megatron.bridge.cli.terminal import folder_size, progress, quiet, staged_size
from megatron.bridge.cli.text import human_bytes, printable
from megatron.bridge.host import processes as ranks
from megatron.bridge.release_checkpoint import doubts, weights
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import HF_FILES, RELEASE, RUN_CONFIG
from megatron.bridge.release_checkpoint.payload import refuse_damage
from megatron.bridge.release_checkpoint.target import check_export_target, check_space
from megatron.bridge.repair.problems import problems
from megatron.bridge.utils.deferred import lean_imports


@click.command("export", cls=Command)
@CHECKPOINT
@click.argument("hf_out", type=click.Path(path_type=Path))
@click.option(
    "--hf-model",
    metavar="MODEL",
    help="Take the config from this Hugging Face model, a folder or a name on the hub. It must be the model that was "
    f"imported. Default: the model that {RUN_CONFIG} names, or else a config.json made from Megatron-LM's args.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an earlier export at HF_OUT: its weights, config, and tokenizer. Other files stay. "
    "Default: stop if HF_OUT isn't empty.",
)
@DTYPE
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Write weight files of at most this size, such as 5GB. Default: divide the weights into files as the source "
    "does.",
)
@click.option(
    "--adapter-only",
    is_flag=True,
    help="Export only the trained LoRA adapters, in PEFT's format. Default: merge them into their base model and "
    "export the result.",
)
@click.option(
    "--no-strict",
    is_flag=True,
    help="Leave out tensors that the Hugging Face model has no place for, with a warning. Default: stop at them.",
)
@click.option(
    "--push-to-hub",
    metavar="NAME",
    help="Upload HF_OUT to the hub as NAME or OWNER/NAME when it is complete. The model card says what it was made "
    "from.",
)
@click.option("--private", is_flag=True, help="If --push-to-hub creates a repository, make it private.")
@TOKEN
@PROCESSES
@TRUST
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    out: Path,
    hf_out: Path,
    hf_model: str | None,
    overwrite: bool,
    dtype: str | None,
    max_shard_size: str | None,
    adapter_only: bool,
    no_strict: bool,
    push_to_hub: str | None,
    private: bool,
    token: str | None,
    processes: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Export the checkpoint at OUT as a Hugging Face model.

    OUT is an imported or a trained checkpoint. HF_OUT must not exist, or must be an empty folder. It appears when the
    export is complete. With --overwrite, the earlier export stays until then.
    """
    if max_shard_size and not re.fullmatch(r"[1-9][0-9]*([KMGT]i?B)", max_shard_size, re.IGNORECASE):
        raise click.UsageError(f"--max-shard-size is {max_shard_size}; expected a size, such as 5GB. Correct it.")
    if adapter_only and (dtype or max_shard_size):
        raise click.UsageError("--adapter-only exports the adapters as they are. Drop --dtype and --max-shard-size.")
    if adapter_only and processes > 1:
        raise click.UsageError("--adapter-only writes one small file. Drop --processes.")
    if private and not push_to_hub:
        raise click.UsageError("--private is only for --push-to-hub. Pass --push-to-hub too, or drop --private.")
    set_hub(token, None)
    check_export_target(hf_out, overwrite)
    found = examine(out)
    if found.payload is None:
        raise click.ClickException(f"{out} can't be loaded. {printable(problems(found)[0].what)}")
    refuse_damage(found.payload)
    expected = weights.size(found.payload.metadata) if found.payload.metadata else 0
    # With another dtype or shard size, the weights are written a second time before the first copy goes.
    check_space(hf_out, expected * (2 if dtype or max_shard_size else 1))
    if in_processes(ctx, processes):
        return
    with (
        quiet(ctx.obj) as terminal,
        progress(terminal, f"Exporting {out}", lambda: staged_size(hf_out), expected),
    ):
        with lean_imports():
            import torch

            from megatron.bridge.models.conversion import layout_families

            layout_families.install_for(hf_model or _kept_model(out, found.payload.path))
            from megatron.bridge import AutoBridge

        source = hf_model or _imported_from(out)
        options = {"trust_remote_code": True} if trust_remote_code else {}
        if source is None and found.payload.args is not None:
            bridge = AutoBridge.from_megatron_args(out)
        elif source is None:
            raise ValueError(f"{out} doesn't name the Hugging Face model that it came from. Pass it with --hf-model.")
        else:
            bridge = AutoBridge.from_hf_pretrained(source, **options)
        if adapter_only:
            module("models.conversion.trained_adapter").export_adapter(bridge, out, hf_out, overwrite=overwrite)
        else:
            asked: dict[str, Any] = {"dtype": getattr(torch, dtype)} if dtype else {}
            if max_shard_size:
                asked["max_shard_size"] = max_shard_size
            if no_strict:
                asked["strict"] = False
            bridge.export_ckpt(out, hf_out, show_progress=False, source_path=hf_model, overwrite=overwrite, **asked)
    if not ranks.is_first():
        return
    size = folder_size(hf_out)
    address = None
    if push_to_hub:
        hub = module("utils.hub_upload")
        card = hub.model_card(
            source or str(out.absolute()), str(out.absolute()), found.payload.iteration, adapter_only
        )
        address = hub.upload(hf_out, push_to_hub, private, card)
    if as_json:
        document = {"path": str(hf_out), "kind": "adapter" if adapter_only else "model", "bytes": size}
        click.echo(json.dumps(document | {"hub": address, "warnings": terminal.warnings}, indent=2))
        return
    what = "an adapter of PEFT" if adapter_only else "a Hugging Face model"
    click.echo(f"Wrote {hf_out}: {what}, {human_bytes(size)}.")
    if address:
        click.echo(f"Uploaded it to {address}.")


def _kept_model(out: Path, payload: Path) -> str | Path:
    """Return where the config of a checkpoint's model is. It decides how the checkpoint is exported."""
    kept = (each / HF_FILES for each in (payload, out / RELEASE) if (each / HF_FILES / "config.json").is_file())
    return next(kept, None) or doubts.imported_from(payload) or payload


def _imported_from(out: Path) -> str | None:
    """Return the Hugging Face model that `run_config.yaml` names, None if there is no such file."""
    from megatron.bridge.training.utils.checkpoint_utils import get_hf_model_id_from_checkpoint

    source = get_hf_model_id_from_checkpoint(str(out))
    if source is None:
        return None
    # A name on the hub has at most one slash.
    if (source.startswith((".", "~", "/")) or source.count("/") > 1) and not Path(source).expanduser().is_dir():
        raise ValueError(f"{out} was imported from {source}, which is no folder here: pass the model with --hf-model.")
    return source
