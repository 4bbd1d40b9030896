# SPDX-License-Identifier: Apache-2.0
"""Builds a model from the stand-ins of `stand_ins.py`, in a process that only converts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch.overrides import TorchFunctionMode

from megatron.bridge.host import stand_ins


__all__ = ["of_stand_ins"]

P = ParamSpec("P")
T = TypeVar("T")


def of_stand_ins(create: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Decorates a function that creates a model of a provider, its first argument.

    In a process with the stand-ins, tensors that ask for a CUDA device are created on the default device. That is the
    meta device for a model that is streamed. In other processes the function runs as it is.
    """

    @wraps(create)
    def wrapper(model_provider: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        if not stand_ins.are_installed():
            return create(model_provider, *args, **kwargs)
        on_cpu = model_provider.use_cpu_initialization
        # Initialization on the CPU makes each weight a second time, in full.
        model_provider.use_cpu_initialization = on_cpu and torch.get_default_device().type != "meta"
        try:
            with _on_default_device():
                return create(model_provider, *args, **kwargs)
        finally:
            model_provider.use_cpu_initialization = on_cpu

    return wrapper


@contextmanager
def _on_default_device() -> Iterator[None]:
    environment = dict(os.environ)
    try:
        with (
            patch.object(torch.cuda, "current_device", torch.get_default_device),
            patch.object(CudaRNGStatesTracker, "fork", lambda self, name=None: nullcontext()),
            _DefaultDevice(),
        ):
            yield
    finally:
        # Core sets NVTE_* variables for the model's attention, and refuses a later model that needs other values.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


class _DefaultDevice(TorchFunctionMode):
    """Creates on the default device what asks for a CUDA device by name, and leaves there what moves to one."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
            kwargs["device"] = torch.get_default_device()
        return func(*args, **kwargs)
