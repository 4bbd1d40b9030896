# SPDX-License-Identifier: Apache-2.0
"""What Megatron Core's forward pass asks of CUDA, answered by the CPU, in a process that does nothing else.

A proof is computed in float32 on the CPU wherever it runs, by Megatron Core's own layers, so that a verdict doesn't
depend on the host. Transformer Engine and Apex compute on a GPU alone.
"""

import contextlib
import functools
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


# Megatron-LM's flags for a host without Transformer Engine and Apex, one rank, and float32.
FLAGS = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
)

_OPTIONAL = ("apex", "comet_ml", "modelopt", "sklearn", "transformer_engine", "wandb")


def leave_out_optional_packages() -> None:
    """Let this process import neither other implementations of layers, nor loggers, which take ten seconds."""
    sys.modules.update(dict.fromkeys(_OPTIONAL, None))
    # Compiled functions would bypass `_OnCpu`, and the decorator alone imports torch._inductor.
    torch.compile = lambda model=None, **options: (lambda function: function) if model is None else model


def answer_for_cuda() -> None:
    """Let Megatron Core's forward pass run on the CPU, for the rest of this process."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    _OnCpu().__enter__()
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Nothing is drawn: the state of dropout needs no care.
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    let_local_layers_compute_all()


def let_local_layers_compute_all() -> None:
    """Let Megatron Core's local layers compute what only those of Transformer Engine do, until this process ends."""
    _let_attention_take_head_sizes()
    _let_norms_be_zero_centered()


class _OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _let_attention_take_head_sizes() -> None:
    """Give Megatron Core's local attention what Transformer Engine's has: the head sizes of latent attention.

    It computes with values of any size, but has no argument for it, and shapes what it returns by `kv_channels`
    (`megatron/core/transformer/dot_product_attention.py`, `DotProductAttention`, core 0.19.2).
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    initialize = DotProductAttention.__init__

    @functools.wraps(initialize)
    def with_head_sizes(
        self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        initialize(self, *args, **kwargs)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = with_head_sizes


def _let_norms_be_zero_centered() -> None:
    """Give PyTorch's norms what Transformer Engine's have: a weight that is added to 1.

    Megatron Core's wrapper refuses it (`megatron/core/transformer/torch_norm.py`, `WrappedTorchNorm`, core 0.19.2).
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class RMSNorm(torch.nn.RMSNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(hidden, self.normalized_shape, self.weight + 1, self.eps)

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            weight = self.weight + 1
            return torch.nn.functional.layer_norm(hidden, self.normalized_shape, weight, self.bias, self.eps)

    refusing = WrappedTorchNorm.__new__

    def norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        if not config.layernorm_zero_centered_gamma:
            return refusing(cls, config, hidden_size, eps=eps, **kwargs)
        kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
        return kind(hidden_size, eps=eps)

    WrappedTorchNorm.__new__ = norm
