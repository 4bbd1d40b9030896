# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that Megatron-LM reads and writes: their args, and the model of what it has trained from a release."""

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron.bridge.release_checkpoint.layout import (
    RELEASE,
    RUN_CONFIG,
    as_path,
    is_payload,
    release_for,
    resolve_checkpoint,
)
from megatron.bridge.training.utils import checkpoint_utils


if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from megatron.bridge.models.conversion.auto_bridge import AutoBridge


def read_megatron_lm_args(checkpoint: str | os.PathLike) -> Namespace:
    """Read the Megatron-LM args of a checkpoint.

    Args:
        checkpoint: Checkpoint root or payload folder.

    Raises:
        ValueError: The checkpoint has no args. Imports had none before release checkpoints.
    """
    # That module imports the training package.
    from megatron.bridge.training.mlm_compat.arguments import _load_args_from_checkpoint

    payload = resolve_checkpoint(checkpoint)
    try:
        return _load_args_from_checkpoint(payload)
    except AssertionError:
        raise ValueError(f"{payload} holds no Megatron-LM args: import the model again with release=True") from None


def run_config_folder(payload: str | os.PathLike) -> str:
    """Return the folder with the run config that describes a payload.

    Megatron-LM writes none. What it saves beside a release checkpoint was trained from it and has the same model.

    Args:
        payload: Payload folder, a local path or a MultiStorageClient URL.

    Returns:
        The release beside the payload if only that one has a ``run_config.yaml``, otherwise the payload.
    """
    path = as_path(payload)
    if not path.name.startswith("iter_") or not path.is_dir() or (path / RUN_CONFIG).exists():
        return str(payload)
    release = path.parent / RELEASE
    return str(release if (release / RUN_CONFIG).exists() else payload)


def base_of_adapters(path: str | os.PathLike) -> str:
    """Find the checkpoint that adapters are trained on. Collective: every rank calls it.

    Adapters that are saved beside their release move its tracker on, so that the root no longer names their base.

    Args:
        path: The value of ``pretrained_checkpoint``: a checkpoint root, a payload or Hugging Face folder, or a URL.

    Returns:
        The release of a root whose tracker names that release or adapters, otherwise ``path``.

    Raises:
        FileNotFoundError: The tracker names a folder that does not exist.
    """
    path = release_for(path)
    release = as_path(path) / RELEASE
    if not release.is_dir():
        return str(path)
    payload = resolve_checkpoint(path)
    if payload == str(release):
        return payload
    if not (as_path(payload) / RUN_CONFIG).exists():
        return str(path)
    run_config = checkpoint_utils.read_run_config(checkpoint_utils.get_checkpoint_run_config_filename(payload))
    return str(path) if run_config.get("peft") is None else str(release)


def lacks_run_config(payload: str | os.PathLike) -> bool:
    """Return whether no run config describes a payload, as Megatron-LM saves it without a release beside it."""
    return is_payload(payload) and not (as_path(run_config_folder(payload)) / RUN_CONFIG).exists()


def load_with_hf_config(
    bridge: "AutoBridge", payload: str | os.PathLike, mp_overrides: dict[str, Any] | None = None, **options: Any
) -> "list[MegatronModule]":
    """Load a payload without run config, as Megatron-LM saves it into a folder of its own.

    Its args describe the model in Megatron-LM's terms. The bridge's Hugging Face config describes the same model in
    Bridge's, with everything that an export needs.

    Args:
        bridge: The bridge of the model that was trained.
        payload: Payload folder, a local path or a MultiStorageClient URL.
        mp_overrides: Parallelism of the model to build. Default: one rank.
        **options: Further arguments of `build_and_load_model`.

    Returns:
        The model chunks of this rank, with the payload's weights.
    """
    from megatron.bridge.training.model_load_save import build_and_load_model

    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in (mp_overrides or {}).items():
        if value is not None:
            setattr(provider, name, value)
    in_group = dist.is_initialized()
    model: Any = build_and_load_model(
        str(payload),
        provider,
        use_cpu_init=in_group and dist.get_backend() == "gloo",
        skip_temp_dist_context=in_group,
        **options,
    )
    return model if isinstance(model, list) else [model]
