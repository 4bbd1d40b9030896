# SPDX-License-Identifier: Apache-2.0
"""Lets the stand-ins for Transformer Engine's modules compute, on the CPU and in the dtype of their input.

A model that a conversion builds can then be judged by its logits. What the modules compute is in the documentation of
Transformer Engine's API for PyTorch; there are no kernels, no FP8, and one rank. Of mamba-ssm and causal-conv1d they
have the functions that Megatron Core calls without the memory-efficient path: the recurrence of Mamba 2 (Dao and Gu,
arXiv 2405.21060), step by step.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from megatron.bridge.host import stand_ins


# Arguments of the modules that decide what they compute.
_KEPT = (
    "eps",
    "normalization",
    "zero_centered_gamma",
    "return_bias",
    "num_gqa_groups",
    "softmax_scale",
    "softmax_type",
    "window_size",
    "kv_channels",
    "group_size",
)


def install() -> None:
    """Install the stand-ins, which compute from now on."""
    for module, forward in _FORWARD.items():
        module.forward = forward
        module.__init__ = _keeping(module.__init__)
    for name in [each for each in stand_ins._MODULES if each[1] == "get_cpu_offload_context"]:
        stand_ins._MODULES[name] = lambda *args, **kwargs: (contextlib.nullcontext(), None)
    refusing = stand_ins._class_or_refusal
    stand_ins._class_or_refusal = lambda name: _FUNCTIONS[name] if name in _FUNCTIONS else refusing(name)
    stand_ins.install()


def leave_out_kernels() -> None:
    """Let Megatron Core, which has been imported, multiply without Transformer Engine's own function."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def _keeping(initialize: Any) -> Any:
    @functools.wraps(initialize)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        # The constructor of a base class keeps what is its own.
        self.kept = {name: kwargs[name] for name in _KEPT if name in kwargs} | vars(self).get("kept", {})

    return wrapper


def _norm(self: Any, hidden: torch.Tensor, prefix: str = "") -> torch.Tensor:
    weight, bias = getattr(self, f"{prefix}weight"), getattr(self, f"{prefix}bias", None)
    weight = weight + 1 if self.kept.get("zero_centered_gamma") else weight
    eps = self.kept.get("eps", 1e-5)
    if bias is not None:
        return functional.layer_norm(hidden, weight.shape, weight, bias, eps)
    return functional.rms_norm(hidden, weight.shape, weight, eps)


def _linear(self: Any, hidden: torch.Tensor, **unused: Any) -> Any:
    bias = self.bias if self.use_bias else None
    if self.kept.get("return_bias"):
        return functional.linear(hidden, self.weight), bias
    return functional.linear(hidden, self.weight, bias)


def _norm_linear(self: Any, hidden: torch.Tensor, **unused: Any) -> Any:
    return _linear(self, _norm(self, hidden, "layer_norm_"))


def _grouped_linear(self: Any, hidden: torch.Tensor, splits: Sequence[int], **unused: Any) -> Any:
    splits = splits.tolist() if isinstance(splits, torch.Tensor) else list(splits)
    biases = [getattr(self, f"bias{index}") if self.use_bias else None for index in range(self.num_gemms)]
    returned = self.kept.get("return_bias")
    parts = [
        functional.linear(part, getattr(self, f"weight{index}"), None if returned else biases[index])
        for index, part in enumerate(hidden.split(splits))
    ]
    return (torch.cat(parts), biases) if returned else torch.cat(parts)


def _attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    attn_mask_type: str,
    core_attention_bias: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """Attend to keys and values `[length, sequences, groups, channels]`; return `[length, sequences, channels]`."""
    query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = self.kept.get("softmax_scale") or query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    places = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    hidden = torch.zeros_like(places, dtype=torch.bool)
    if "causal" in attn_mask_type:
        hidden |= places < 0
    left, right = self.kept.get("window_size") or (-1, -1)
    if left >= 0:
        hidden |= places > left
    if right >= 0:
        hidden |= -places > right
    if attn_mask_type == "arbitrary":
        hidden = hidden | mask
    scores = scores if core_attention_bias is None else scores + core_attention_bias
    scores = scores.masked_fill(hidden, -torch.inf)
    if self.kept.get("softmax_type") == "learnable":
        sinks = self.softmax_offset[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).permute(2, 0, 1, 3).flatten(2)


def _gated_norm(self: Any, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    hidden = hidden * functional.silu(gate)
    groups = hidden.unflatten(-1, (-1, self.kept["group_size"]))
    return functional.rms_norm(groups, groups.shape[-1:], eps=self.kept["eps"]).flatten(-2) * self.weight


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, activation: str, seq_idx: None = None
) -> torch.Tensor:
    """Convolve `x` `[sequences, channels, length]` with what came before; each channel has its own `weight`."""
    channels, width = weight.shape
    found = functional.conv1d(functional.pad(x, (width - 1, 0)), weight[:, None], bias, groups=channels)
    return functional.silu(found)


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor,
    dt_softplus: bool,
    return_final_states: bool,
    initial_states: None,
) -> torch.Tensor:
    """Run the recurrence over `x` `[sequences, length, heads, channels]`, `b` and `c` `[…, groups, states]`."""
    dt = functional.softplus(dt + dt_bias)
    heads = x.shape[2]
    b, c = (each.repeat_interleave(heads // each.shape[2], 2) for each in (b, c))
    state = x.new_zeros(x.shape[0], heads, x.shape[3], b.shape[3])
    found = []
    for step in range(x.shape[1]):
        kept = (dt[:, step] * decay).exp()[..., None, None]
        added = (dt[:, step, :, None] * x[:, step])[..., None] * b[:, step, :, None]
        state = kept * state + added
        found.append((state * c[:, step, :, None]).sum(-1))
    found = torch.stack(found, 1) + D[:, None] * x
    return found if z is None else found * functional.silu(z)


_FORWARD = {
    stand_ins.GatedRMSNorm: _gated_norm,
    stand_ins.RMSNorm: _norm,
    stand_ins.LayerNorm: _norm,
    stand_ins.Linear: _linear,
    stand_ins.LayerNormLinear: _norm_linear,
    stand_ins.GroupedLinear: _grouped_linear,
    stand_ins.DotProductAttention: _attention,
}


class _Split:
    """`SplitAlongDim`, which is `torch.split`."""

    @staticmethod
    def apply(tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tensor.split(sizes, dim)


def _l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    return x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()


_FUNCTIONS = {
    "l2norm": _l2norm,
    "_SplitAlongDim": _Split,
    "SplitAlongDim": _Split,
    "causal_conv1d_fn": _convolve,
    "mamba_chunk_scan_combined": _scan,
}
