# SPDX-License-Identifier: Apache-2.0
"""What differs between a host with an accelerator and one without.

An accelerator is whatever answers to ``torch.cuda``: NVIDIA GPUs, and AMD GPUs under ROCm. On a host that has one
nothing here changes what Megatron Bridge does.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state


P = ParamSpec("P")
T = TypeVar("T")


def is_available() -> bool:
    """Returns whether this process sees an accelerator, NVIDIA or AMD."""
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def backend() -> str:
    """Returns the `torch.distributed` backend of this host: "nccl" (RCCL on ROCm answers to it, too) or "gloo"."""
    return "nccl" if is_available() else "gloo"


def device() -> str:
    """Returns the device type that the collectives of `backend` take: "cuda" or "cpu"."""
    return "cuda" if is_available() else "cpu"


def with_process_group(convert: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that needs Megatron's process groups usable on a host without an accelerator.

    There, and only where no process group exists, the function runs within a gloo group: of torchrun's ranks, else of
    one rank. The group and Megatron's parallel state are gone when it returns or raises, so that it can be called
    again and leaves the process as it was.
    """

    @functools.wraps(convert)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_available() or dist.is_initialized():
            return convert(*args, **kwargs)
        if dist.is_torchelastic_launched():
            with _group_of_torchrun():
                return convert(*args, **kwargs)
        # Imported here because the training package imports the models, which import this module.
        from megatron.bridge.training.model_load_save import temporary_distributed_context

        with temporary_distributed_context(backend="gloo"):
            return convert(*args, **kwargs)

    return wrapper


@contextmanager
def _group_of_torchrun() -> Iterator[None]:
    dist.init_process_group("gloo")
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
