# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages whose modules a checkpoint is made of, and whose kernels a conversion never runs.

A checkpoint has the parameters, the extra states, and the names of Transformer Engine's modules. Without Transformer
Engine and an accelerator, a conversion can build its model from stand-ins that have these and compute nothing. FLA,
mamba-ssm, and causal-conv1d give Megatron Core functions, and a norm. Megatron Core decides when it is imported
whether there is a Transformer Engine. So `install` belongs to a process that only converts: a command's, or that of
`own_process.py`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from typing import Any, NoReturn

import torch


__all__ = ["are_installed", "are_needed", "install"]

# Megatron Core asks for versions. 2.9.0 is the oldest Transformer Engine that core 0.19 has no fallback for.
VERSIONS = {
    "transformer_engine": "2.9.0",
    "transformer_engine_torch": "2.9.0",
    "causal_conv1d": "1.5.0",
    "fla": "0.4.0",
    "mamba_ssm": "2.2.6",
}
# Imported for what they register, which no checkpoint has: a CUDA extension of Apex that Megatron Core's linear layers
# want beside Transformer Engine, and ModelOpt's quantized forms of Transformer Engine's modules.
EMPTY = ("fused_weight_gradient_mlp_cuda", "modelopt.torch.quantization.plugins.transformer_engine")
# Submodules that Megatron Core and Bridge reach as attributes, without importing them.
_SUBMODULES = ("attention", "common", "distributed", "fp8", "module", "ops", "pytorch", "recipe")


def are_installed() -> bool:
    """Return whether this process has the stand-ins."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def are_needed() -> bool:
    """Return whether this host lacks Transformer Engine or an accelerator. Megatron Core isn't imported for it."""
    core = sys.modules.get("megatron.core.extensions.transformer_engine")
    found = core.HAVE_TE if core else importlib.util.find_spec("transformer_engine") is not None
    return not (found and torch.cuda.is_available() and torch.cuda.device_count() > 0)


def install() -> None:
    """Install the stand-ins for the rest of this process, and let it see no accelerator.

    Raises:
        RuntimeError: Megatron Core is imported, and has decided that there is no Transformer Engine.
    """
    if are_installed():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "found megatron.core imported, expected a new process: install the stand-ins for Transformer Engine first"
        )
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    sys.meta_path.insert(0, _Finder())
    installed = importlib.metadata.version
    importlib.metadata.version = lambda name: VERSIONS.get(name.replace("-", "_")) or installed(name)


class _Layout(torch.nn.Module):
    """A module of Transformer Engine: parameters, and the extra state of a module without FP8, which is empty."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def set_tensor_parallel_group(self, group: Any) -> None:
        pass

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(type(self).__name__)

    def _add(self, name: str, *shape: int, dtype: torch.dtype | None) -> None:
        # On the default device, whatever device is asked for.
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype)))


class Linear(_Layout):
    """`transformer_engine.pytorch.Linear`: a weight of shape [out_features, in_features] of one rank, and a bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self._add_parameters(rows, columns, params_dtype)

    def _add_parameters(self, rows: int, columns: int, dtype: torch.dtype | None) -> None:
        self._add("weight", rows, columns, dtype=dtype)
        if self.use_bias:
            self._add("bias", rows, dtype=dtype)


class LayerNormLinear(Linear):
    """`transformer_engine.pytorch.LayerNormLinear`: the norm in front of a projection is a part of it."""

    def __init__(
        self, in_features: int, out_features: int, *, normalization: str = "LayerNorm", **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self._add("layer_norm_weight", in_features, dtype=kwargs.get("params_dtype"))
        if normalization == "LayerNorm":
            self._add("layer_norm_bias", in_features, dtype=kwargs.get("params_dtype"))


class GroupedLinear(Linear):
    """`transformer_engine.pytorch.GroupedLinear`: the projections of several experts, with numbered weights."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **kwargs: Any) -> None:
        self._number = num_gemms
        super().__init__(in_features, out_features, **kwargs)
        self.num_gemms = num_gemms
        # Megatron Core splits and joins the extra states of experts by these.
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def _add_parameters(self, rows: int, columns: int, dtype: torch.dtype | None) -> None:
        for index in range(self._number):
            self._add(f"weight{index}", rows, columns, dtype=dtype)
            if self.use_bias:
                self._add(f"bias{index}", rows, dtype=dtype)


class RMSNorm(_Layout):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(self, normalized_shape: int, *, params_dtype: torch.dtype | None = None, **unused: Any) -> None:
        super().__init__()
        self._add("weight", normalized_shape, dtype=params_dtype)


class LayerNorm(RMSNorm):
    """`transformer_engine.pytorch.LayerNorm`."""

    def __init__(self, normalized_shape: int, *, params_dtype: torch.dtype | None = None, **unused: Any) -> None:
        super().__init__(normalized_shape, params_dtype=params_dtype)
        self._add("bias", normalized_shape, dtype=params_dtype)


class DotProductAttention(_Layout):
    """`transformer_engine.pytorch.DotProductAttention`, with a float32 value a head if the softmax is learned."""

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, *, tp_size: int = 1, softmax_type: str = "vanilla", **_: Any
    ) -> None:
        super().__init__()
        if softmax_type == "learnable":
            self._add("softmax_offset", num_attention_heads // tp_size, dtype=torch.float32)


class GatedRMSNorm(torch.nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm`."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.register_parameter("bias", None)


def _no_offload(*args: Any, **kwargs: Any) -> tuple[None, None]:
    return None, None


_MODULES: dict[tuple[str, str], Any] = {
    ("transformer_engine.pytorch", each.__name__): each
    for each in (DotProductAttention, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm)
} | {
    ("mamba_ssm.ops.triton.layernorm_gated", "RMSNorm"): GatedRMSNorm,
    # Megatron Core calls it when it builds a block. Its module depends on the version.
    ("transformer_engine.pytorch", "get_cpu_offload_context"): _no_offload,
    ("transformer_engine.pytorch.cpu_offload", "get_cpu_offload_context"): _no_offload,
    ("transformer_engine.pytorch.cpu_offload_v1", "get_cpu_offload_context"): _no_offload,
}


def refuse(name: str) -> NoReturn:
    """Raise NotImplementedError for a call of what has no kernel here."""
    raise NotImplementedError(f"{name} has a layout here and no kernels: this process converts and computes nothing")


def _class_or_refusal(name: str) -> Any:
    """Return an empty class for a capitalized name, otherwise a function that refuses its call."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(name)

    refused.__name__ = name
    return refused if name.lstrip("_")[:1].islower() else type(name, (), {"apply": refused})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes every module of the packages that have stand-ins."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name in EMPTY or name.partition(".")[0] in VERSIONS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__all__ = []
        module.__version__ = VERSIONS.get(module.__name__.partition(".")[0])
        module.__getattr__ = lambda name: self._attribute(module.__name__, name)

    def _attribute(self, module: str, name: str) -> Any:
        if (module, name) in _MODULES:
            return _MODULES[module, name]
        if name in _SUBMODULES and module not in EMPTY:
            return importlib.import_module(f"{module}.{name}")
        return _class_or_refusal(name)
