# SPDX-License-Identifier: Apache-2.0
"""An export grows beside its target, and gets the target's name when it is whole."""

import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.bridge.host import accelerator, processes
from megatron.bridge.models.hf_pretrained.model_files import RESAVED, TEMPLATES, is_one_of
from megatron.bridge.release_checkpoint.files import Staging, sync
from megatron.bridge.release_checkpoint.layout import as_path, resolve_checkpoint
from megatron.bridge.release_checkpoint.leftovers import clear
from megatron.bridge.release_checkpoint.target import check_export_target


logger = logging.getLogger(__name__)

# What save_hf_weights writes, under whatever names an earlier export had for its shards.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def exports_whole(export_ckpt: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``export_ckpt``: it writes to a staging folder, which takes the place of its target at the end.

    Under torchrun all ranks share one export.
    """

    @functools.wraps(export_ckpt)
    def export(
        bridge: Any,
        megatron_path: str | os.PathLike,
        hf_path: str | os.PathLike,
        *args: Any,
        overwrite: bool | None = None,
        **kwargs: Any,
    ) -> None:
        from megatron.bridge.training.release_writer import on_rank_0

        with ExitStack() as stack:
            if dist.is_torchelastic_launched() and not dist.is_initialized():
                stack.enter_context(accelerator.gloo_group())
            # What the environment says of ranks is of no account where every process exports by itself.
            call = on_rank_0 if dist.is_initialized() else lambda function, *arguments: function(*arguments)
            opened: list[Staging] = []
            stack.callback(lambda: list(map(_close, opened)))
            payload = call(_stage, opened, bridge, megatron_path, hf_path, overwrite)
            try:
                export_ckpt(bridge, megatron_path, payload, *args, **kwargs)
            except BaseException as error:
                # Before the folder goes, in which other ranks may still write: they would say that it is gone.
                processes.has_to_say(error)
                raise
            if dist.is_initialized():
                dist.barrier()
            call(_publish, opened, Path(hf_path), overwrite)

    return export


def _stage(
    opened: list[Staging],
    bridge: Any,
    megatron_path: str | os.PathLike,
    hf_path: str | os.PathLike,
    overwrite: bool | None,
) -> str:
    if not isinstance(as_path(hf_path), Path):
        raise ValueError(f"{hf_path} is in an object store, where no export is written: pass a local path")
    check_export_target(Path(hf_path), overwrite)
    target = Path(hf_path).resolve()
    checkpoint = as_path(resolve_checkpoint(megatron_path))
    if isinstance(checkpoint, Path) and checkpoint.resolve().is_relative_to(target):
        raise FileExistsError(f"{hf_path} holds the checkpoint that is exported: pass a different path")
    source = getattr(bridge.hf_pretrained, "model_name_or_path", None)
    if overwrite and source and target.is_dir() and Path(source).is_dir() and target.samefile(source):
        raise FileExistsError(f"{hf_path} is the model that was imported, expected another: pass a different path")
    staging = Staging(target)
    opened.append(staging)
    staging.open()
    clear(staging.payload)
    # It may have put back what an export was killed over.
    check_export_target(Path(hf_path), overwrite)
    return str(staging.payload)


def _publish(opened: list[Staging], hf_path: Path, overwrite: bool | None) -> None:
    (staging,) = opened
    target, payload = staging.target, staging.payload
    # Another export may have come first.
    check_export_target(hf_path, overwrite)
    is_there = target.is_dir() and any(target.iterdir())
    if target.is_dir():
        shutil.copymode(target, payload)
    if is_there:
        replaced = (*_WEIGHTS, *RESAVED, TEMPLATES) if overwrite else _WEIGHTS
        for path in target.iterdir():
            if not os.path.lexists(payload / path.name) and not is_one_of(path.name, *replaced):
                _keep(path, payload / path.name)
    for path in (*payload.rglob("*"), payload):
        if path.is_dir() or path.is_file() and not path.is_symlink():
            sync(path)
    if is_there:
        staging.put(before=lambda: None)
    else:
        try:
            payload.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"another process has written {hf_path} meanwhile: pass a different path") from None
    sync(target.parent)


def _close(staging: Staging) -> None:
    try:
        staging.close()
    except OSError as error:
        # Some network file systems keep the folder of an open file.
        logger.warning("%s could not be removed, the next export tries again: %s", staging.folder, error)


def _keep(path: Path, new: Path) -> None:
    """Give a file or a folder another name, without moving it: the old one goes when the new one is seen."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, new, symlinks=True, copy_function=_link)
    else:
        _link(path, new)


def _link(path: str | os.PathLike, new: str | os.PathLike) -> None:
    try:
        os.link(path, new, follow_symlinks=False)
    except OSError:
        # Not all file systems have hard links.
        shutil.copy2(path, new, follow_symlinks=False)
