# SPDX-License-Identifier: Apache-2.0
"""A model without weights, whose parameters become lists of pieces of files, and what can't be done so."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import MegatronModule

from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor
from megatron.bridge.models.model_provider import ModelProviderMixin


logger = logging.getLogger(__name__)


class CannotStream(Exception):
    """Why a checkpoint can't be converted tensor by tensor."""


@contextmanager
def cannot_stream_if_it_fails(reason: str) -> Iterator[None]:
    """Turn any error into `CannotStream`, because the conversion in memory has errors of its own."""
    try:
        yield
    except CannotStream:
        raise
    except Exception as error:
        logger.debug(reason, exc_info=True)
        line = next(iter(str(error).strip().splitlines()), "")
        raise CannotStream(f"{reason} ({type(error).__name__}: {line})") from error


def meta_model(provider: ModelProviderMixin) -> list[MegatronModule]:
    """Make the model of a provider on the meta device.

    Raises:
        CannotStream: The provider asks for model parallelism.
    """
    if hasattr(provider, "finalize"):
        provider.finalize()
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    if any((getattr(provider, size, 1) or 1) > 1 for size in sizes):
        raise CannotStream("its provider asks for model parallelism")
    recorded = provider.init_model_with_meta_device
    # Megatron Core's own layers take the default device only if they are asked to be on the CPU, Transformer Engine's
    # only if not (core 0.19, tensor_parallel/layers.py and extensions/transformer_engine.py).
    model = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=not HAVE_TE, init_model_with_meta_device=True
    )
    # A save records these two.
    provider.init_model_with_meta_device = recorded
    provider.use_cpu_initialization = True
    return model


def replace_weights(chunks: list[MegatronModule], values: Mapping[torch.Tensor, PiecewiseTensor]) -> None:
    """Put values in the place of parameters and buffers, wherever these are used."""
    planned: dict[torch.Tensor, torch.Tensor] = dict(values)
    for tensor in (tensor for tensor in values if isinstance(tensor, torch.nn.Parameter)):
        planned[tensor] = torch.nn.Parameter(values[tensor], requires_grad=False)
        vars(planned[tensor]).update(vars(tensor))
    for module in (module for chunk in chunks for module in chunk.modules()):
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in list(named(recurse=False, remove_duplicate=False)):
                if tensor in planned:
                    setattr(module, name, planned[tensor])
