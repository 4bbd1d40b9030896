# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's modules without what they compute: parameters, extra states and their names.

Importing this makes `import transformer_engine` succeed in this process, so that Megatron Core's own wrappers build
models with Transformer Engine's layout on a host that has neither it nor a GPU. It shows which keys such a model asks
a checkpoint for, by Megatron Core's code; it is no evidence of what Transformer Engine itself does with them.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types

import torch


VERSION = "2.9.0"
UNLOADED = 7.0  # what every parameter holds until a checkpoint is loaded
SUBMODULES = ("attention", "common", "distributed", "fp8", "ops", "pytorch", "recipe")


class _Module(torch.nn.Module):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0, state

    def set_tensor_parallel_group(self, group):
        pass

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def _add(self, name, *shape, dtype):
        setattr(self, name, torch.nn.Parameter(torch.full(shape, UNLOADED, dtype=dtype)))


class Linear(_Module):
    def __init__(
        self, in_features, out_features, *, bias=True, parallel_mode=None, tp_size=1, params_dtype=None, **unused
    ):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self._add("weight", rows, columns, dtype=params_dtype)
        if bias:
            self._add("bias", rows, dtype=params_dtype)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, normalization, params_dtype=None, **kwargs):
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        self._add("layer_norm_weight", in_features, dtype=params_dtype)
        if normalization == "LayerNorm":
            self._add("layer_norm_bias", in_features, dtype=params_dtype)


class GroupedLinear(_Module):
    def __init__(self, num_gemms, in_features, out_features, *, bias=True, params_dtype=None, tp_size=1, **unused):
        super().__init__()
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.tp_size = bias, tp_size
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for index in range(num_gemms):
            self._add(f"weight{index}", out_features, in_features, dtype=params_dtype)
            if bias:
                self._add(f"bias{index}", out_features, dtype=params_dtype)


class RMSNorm(_Module):
    def __init__(self, normalized_shape, *, params_dtype=None, **unused):
        super().__init__()
        self._add("weight", normalized_shape, dtype=params_dtype)


class LayerNorm(RMSNorm):
    def __init__(self, normalized_shape, *, params_dtype=None, **unused):
        super().__init__(normalized_shape, params_dtype=params_dtype)
        self._add("bias", normalized_shape, dtype=params_dtype)


class DotProductAttention(_Module):
    def __init__(self, *args, **unused):
        super().__init__()


MODULES = {
    each.__name__: each for each in (DotProductAttention, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm)
}


def _no_offload(*args, **kwargs):
    return None, None


def _unused(*args, **kwargs):
    raise NotImplementedError("the stand-in for Transformer Engine computes nothing")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of Transformer Engine; names in it are the classes above, or do nothing."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__version__ = [], VERSION
        module.__getattr__ = lambda name: self._attribute(spec.name, name)
        return module

    def exec_module(self, module):
        pass

    def _attribute(self, module, name):
        if name in SUBMODULES:
            return importlib.import_module(f"{module}.{name}")
        if module == "transformer_engine.pytorch" and name in MODULES:
            return MODULES[name]
        if name == "get_cpu_offload_context":
            return _no_offload
        return _empty_class(name) if not name[0].islower() else _unused


def _empty_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"apply": _unused})


def _install():
    sys.meta_path.insert(0, _Finder())
    # The Apex extension that Megatron Core wants beside Transformer Engine for its own linear layers.
    sys.modules["fused_weight_gradient_mlp_cuda"] = types.ModuleType("fused_weight_gradient_mlp_cuda")
    # ModelOpt registers Transformer Engine's classes; it has no part in reading or writing weights.
    plugin = types.ModuleType("modelopt.torch.quantization.plugins.transformer_engine")
    plugin.__all__ = []
    plugin.__getattr__ = _empty_class
    sys.modules[plugin.__name__] = plugin
    installed = importlib.metadata.version
    importlib.metadata.version = lambda name: VERSION if name == "transformer-engine" else installed(name)


_install()
