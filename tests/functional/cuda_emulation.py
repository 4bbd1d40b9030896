# SPDX-License-Identifier: Apache-2.0
"""Emulate `torch.cuda` on the CPU, so that Megatron-LM's own training loop runs without an accelerator.

Megatron-LM asserts `torch.cuda.is_available()` (`megatron/training/initialize.py`, `initialize_megatron`), asks
`torch.cuda` for streams, events, memory figures, and RNG state, and creates tensors with `device="cuda"`. None of that
decides what is computed. `install()` answers for the CPU and sends every `device="cuda"` to the CPU. The mathematics,
the checkpoint code, and the collectives (gloo) stay those of Megatron-LM and PyTorch.

This is part of the tests, and not of the wheel. `install()` refuses to work beside a real accelerator. It can't
emulate Transformer Engine, Apex, and their fused kernels.
"""

import contextlib
import copy
import os
import sys
import types
from collections.abc import Callable
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


# Megatron-LM reads these when it starts. Compiled functions would bypass the function mode below. With sequence
# parallelism, Megatron Core requires one connection (`megatron/training/arguments.py`, `validate_args`).
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

_CPU = torch.device("cpu")


def accelerator() -> str | None:
    """Return the accelerator that torch finds.

    Returns:
        "rocm", "cuda", or None if torch finds no device.
    """
    if not torch.cuda.is_available():
        return None
    return "rocm" if torch.version.hip else "cuda"


class Event:
    """A CUDA event on a device where everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing: all work is already done."""

    def wait(self, stream: Any = None) -> None:
        """Return at once: CPU work is done when its call returns."""

    def synchronize(self) -> None:
        """Return at once: CPU work is done when its call returns."""

    def query(self) -> bool:
        """Return True: the work before this event is done."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return 0, because no test uses the time."""
        return 0.0


class Stream(Event):
    """A CUDA stream on a device that has only one order of work."""

    cuda_stream = 0
    device = _CPU

    def wait_stream(self, stream: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has happened."""
        return event or Event()


_STREAM = Stream()


class _DeviceToCpu(TorchFunctionMode):
    """Sends each torch call that names a CUDA device to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device and args and str(args[0]).startswith("cuda"):
            return _CPU
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-LM's optimizers recognize float32, float16, and bfloat16 only by these names.
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"], index_too=True)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        index_too = func is torch.Tensor.to
        return func(*(_to_cpu(value, index_too) for value in args), **kwargs)


def _to_cpu(value: Any, index_too: bool = False) -> Any:
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str):
        return _CPU if value == "cuda" or value.startswith("cuda:") else value
    # `tensor.to(0)` and `device=torch.cuda.current_device()` name a CUDA device by its index.
    if index_too and isinstance(value, int) and not isinstance(value, bool):
        return _CPU
    return value


def _answer(value: Any) -> Callable[..., Any]:
    # Return a new function each time, because torch._dynamo refuses one function under two names.
    return lambda *args, **kwargs: value


def _context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _answers() -> dict[str, Any]:
    """Return the replacements for attributes of `torch.cuda`, by name."""
    properties = types.SimpleNamespace(
        name="CPU (emulated)", major=8, minor=0, total_memory=2**36, multi_processor_count=1, gcnArchName=""
    )
    constants = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": False,
        "is_current_stream_capturing": False,
        "init": None,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": 0,
        "set_device": None,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "synchronize": None,
        "empty_cache": None,
        "ipc_collect": None,
        "current_stream": _STREAM,
        "default_stream": _STREAM,
        "set_stream": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "device_memory_used": 0,
        "reset_peak_memory_stats": None,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "utilization": 0,
    }
    classes = {"Event": Event, "Stream": Stream, "ExternalStream": type("ExternalStream", (Stream,), {})}
    return {
        **{name: _answer(value) for name, value in constants.items()},
        **classes,
        "memory_stats": lambda *args, **kwargs: _NoFigures(),
        "stream": lambda *args, **kwargs: _context(),
        "device": lambda *args, **kwargs: _context(),
        # CPU and "CUDA" share one generator. Megatron-LM saves and forks the "CUDA" state for dropout.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed) and None,
        "get_rng_state": lambda *args, **kwargs: torch.default_generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.default_generator.set_state(state) and None,
        "default_generators": (torch.default_generator,),
    }


class _NoFigures(dict):
    def __missing__(self, key: str) -> int:
        return 0


_installed: list[Any] = []


def install() -> None:
    """Emulate `torch.cuda` on the CPU for the rest of this process. Call it before Megatron-LM is imported.

    Raises:
        RuntimeError: There is a real accelerator.
    """
    if _installed:
        return
    found = accelerator()
    if found:
        raise RuntimeError(f"found a {found} device; the emulation of torch.cuda works only on hosts without one")
    os.environ.update(ENVIRONMENT)
    if "--use-torch-fsdp2" in sys.argv:
        # FSDP refuses one connection.
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    for name, value in _answers().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _answer(None))
    mode = _DeviceToCpu()
    mode.__enter__()
    _installed.append(mode)
    _let_norms_be_sequence_parallel()
    _let_attention_take_packed_sequences()
    _fork_the_queue_of_saves()


def _let_norms_be_sequence_parallel() -> None:
    """Mark the weights of PyTorch's norms for sequence parallelism, as other libraries' norms do.

    Each rank normalizes its part of the sequence, so the gradients of the weights must be summed over the tensor
    parallel ranks. Megatron Core does that for marked weights (`megatron/core/distributed/finalize_model_grads.py`,
    core 0.19.2). Its wrapper of PyTorch's norms refuses sequence parallelism
    (`megatron/core/transformer/torch_norm.py`).
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    refusing = WrappedTorchNorm.__new__

    def norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        module = refusing(cls, plain, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return module

    WrappedTorchNorm.__new__ = norm


def _let_attention_take_packed_sequences() -> None:
    """Let Megatron Core's local attention take packed sequences, as Transformer Engine's does.

    Each sequence attends only to itself. `cu_seqlens_q` holds where each begins. Megatron Core refuses packed
    sequences (`megatron/core/transformer/dot_product_attention.py`, `DotProductAttention.forward`, core 0.19.2), and
    `SFTDataset` makes no others.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    refusing = DotProductAttention.forward

    @wraps(refusing)
    def attend(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return refusing(self, query, key, value, *args, **kwargs)
        bounds = pairwise(packed_seq_params.cu_seqlens_q.tolist())
        sequences = [[each[start:end].unsqueeze(1) for each in (query, key, value)] for start, end in bounds]
        return torch.cat([refusing(self, *each, *args, **kwargs) for each in sequences if len(each[0])])

    DotProductAttention.forward = attend


def _fork_the_queue_of_saves() -> None:
    """Let each rank fork the process that collects the results of its save.

    Megatron Core spawns it (`megatron/core/dist_checkpointing/strategies/filesystem_async.py`,
    `get_write_results_queue`, core 0.19.2). A spawned process imports torch first, on every rank and in every save.
    With `--use-persistent-ckpt-worker` Megatron-LM forks it too (`megatron/training/async_utils.py`,
    `init_persistent_async_worker`). Older versions can't fork it, and take longer.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if spawning := getattr(filesystem_async, "get_write_results_queue", None):
        filesystem_async.get_write_results_queue = partial(spawning, "fork")
