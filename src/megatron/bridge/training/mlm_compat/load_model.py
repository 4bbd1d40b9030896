# SPDX-License-Identifier: Apache-2.0
"""Loading what Megatron-LM has trained into the model that a bridge is for."""

import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core.transformer import MegatronModule

from megatron.bridge.training.model_load_save import build_and_load_model
from megatron.bridge.training.release_checkpoint import run_config_folder
from megatron.bridge.training.utils.checkpoint_utils import (
    file_exists,
    get_checkpoint_run_config_filename,
    is_checkpoint_iteration_directory,
)


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge


def lacks_run_config(payload: str | os.PathLike) -> bool:
    """Return whether a payload was saved by Megatron-LM, with no run config of its own or of a release beside it."""
    config = get_checkpoint_run_config_filename(run_config_folder(payload))
    return is_checkpoint_iteration_directory(str(payload)) and not file_exists(config)


def load_with_hf_config(
    bridge: "AutoBridge", payload: str | os.PathLike, mp_overrides: dict[str, Any] | None = None
) -> list[MegatronModule]:
    """Load a payload without run config, as Megatron-LM saves it into a folder of its own.

    Its args describe the model in Megatron-LM's terms; the bridge's Hugging Face config describes the same model in
    Bridge's, with what an export needs beside it.

    Args:
        bridge: The bridge of the model that was trained.
        payload: Payload folder, a local path or a MultiStorageClient URL.
        mp_overrides: Parallelism of the model to build; one rank if not given.

    Returns:
        The model chunks of this rank, with the payload's weights.
    """
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in (mp_overrides or {}).items():
        if value is not None:
            setattr(provider, name, value)
    in_group = dist.is_initialized()
    model = build_and_load_model(
        str(payload),
        provider,
        use_cpu_init=in_group and dist.get_backend() == "gloo",
        skip_temp_dist_context=in_group,
    )
    return model if isinstance(model, list) else [model]
