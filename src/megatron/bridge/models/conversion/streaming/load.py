# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint into a model without weights: its parameters say which bytes of which file make them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.transformer import MegatronModule

from megatron.bridge.host.layout import match_checkpoint
from megatron.bridge.models.conversion.export_account import check_stored
from megatron.bridge.models.conversion.streaming.checkpoint import StreamingLoadStrategy
from megatron.bridge.models.conversion.streaming.model import (
    CannotStream,
    cannot_stream_if_it_fails,
    meta_model,
    replace_weights,
)
from megatron.bridge.models.conversion.streaming.other_formats import other_weights
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.training import untrusted_checkpoint


def load_streaming(payload: str | Path, config: Any) -> list[MegatronModule]:
    """Return the model of a checkpoint, with parameters that are read when they are used.

    Args:
        payload: Payload folder of a distributed checkpoint, a local path.
        config: The model provider.

    Raises:
        CannotStream: The model can't be made without weights, or its weights aren't stored one by one.
        ValueError: The checkpoint has weights of the model in other shapes.
    """
    if not isinstance(config, ModelProviderMixin):
        raise CannotStream("its model has no provider")
    if getattr(config, "restore_modelopt_state", False):
        raise CannotStream("it has state of ModelOpt")
    with cannot_stream_if_it_fails("its model can't be made without weights"):
        model = meta_model(config)
    (chunk,) = unwrap_model(model)
    values = stored_weights(payload, chunk)
    parameters = chunk.state_dict(keep_vars=True)
    if missing := [name for name, _ in chunk.named_parameters() if name not in values]:
        # Gemma 4 has such a projection. A load in memory says if the checkpoint lacks it.
        raise CannotStream(f"{missing[0]} isn't stored by itself")
    replace_weights([chunk], {parameters[name]: values[name] for name in values})
    return model


def stored_weights(payload: str | Path, chunk: MegatronModule) -> Mapping[str, PiecewiseTensor]:
    """Return the weights that a checkpoint has for a model, by their names in its state dict."""
    if (values := other_weights(payload, chunk.state_dict(keep_vars=True))) is not None:
        return values
    with untrusted_checkpoint.reading(payload):
        common = dist_checkpointing.load_common_state_dict(str(payload))
        content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        wanted = match_checkpoint({"model": chunk.sharded_state_dict(metadata=content)}, str(payload))
        check_stored(wanted, payload)
        loaded: Any = dist_checkpointing.load(wanted, str(payload), StreamingLoadStrategy())
    return {name: value for name, value in loaded["model"].items() if isinstance(value, PiecewiseTensor)}
