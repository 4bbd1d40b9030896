# SPDX-License-Identifier: Apache-2.0
"""Answers that depend on whether this process has an accelerator: an NVIDIA GPU, or an AMD GPU under ROCm."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist


__all__ = ["backend", "device", "is_available", "seed", "with_process_group"]

# One rank may write, or prove a model, for hours while the others wait. The death of a rank is noticed at once.
_TIMEOUT = timedelta(days=1)
_groups = itertools.count()

P = ParamSpec("P")
T = TypeVar("T")


def is_available() -> bool:
    """Returns whether this process sees an NVIDIA or AMD accelerator."""
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def backend() -> str:
    """Returns the `torch.distributed` backend of this host: "nccl", which is RCCL on ROCm, or "gloo"."""
    return "nccl" if is_available() else "gloo"


def device() -> str:
    """Returns the device type that `backend` communicates from: "cuda" or "cpu"."""
    return "cuda" if is_available() else "cpu"


def seed(value: int, **kwargs: Any) -> None:
    """Seeds the generators that initialize a model's weights.

    Without an accelerator, Megatron Core draws weights from PyTorch's default generator. Every tensor-parallel rank
    draws the same full matrix (core 0.19, tensor_parallel/layers.py, _initialize_affine_weight_cpu).

    Args:
        value: The seed.
        **kwargs: Further arguments of `model_parallel_cuda_manual_seed`.
    """
    if is_available():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(value, **kwargs)
    else:
        torch.manual_seed(value)


def with_process_group(convert: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that needs Megatron's process groups.

    On a host without an accelerator, the function runs inside a temporary gloo group if no group exists. The group
    spans the ranks that torchrun started, or this process alone.
    """

    @functools.wraps(convert)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_available() or dist.is_initialized():
            return convert(*args, **kwargs)
        with gloo_group():
            return convert(*args, **kwargs)

    return wrapper


@contextmanager
def gloo_group(alone: bool = False) -> Iterator[None]:
    """Has a gloo group of the ranks that torchrun started, or of this process `alone`."""
    from megatron.core import parallel_state

    if dist.is_torchelastic_launched() and not alone:
        store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        # The ranks of a second group would look for one another where those of the first were.
        own = f"conversion-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_groups)}"
        own_store = dist.PrefixStore(own, store)
        dist.init_process_group("gloo", store=own_store, rank=rank, world_size=size, timeout=_TIMEOUT)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(distributed_timeout_minutes=_TIMEOUT // timedelta(minutes=1))
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
