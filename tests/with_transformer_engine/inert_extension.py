# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's Python code without the libraries that compute, on a host that has neither them nor a GPU.

`transformer-engine` on PyPI is Transformer Engine's Python code, as it is on every GPU; `transformer-engine-cu13` and
`transformer-engine-torch` have what is compiled. `install()` puts a module that computes nothing in the place of the
extension `transformer_engine_torch`, so that Transformer Engine's modules can be made: their parameters, extra states
and names are decided in Python. A call of anything compiled is an error.
"""

import functools
import importlib
import os
import sys
import types
import warnings
from typing import Any, NoReturn


EXTENSION = "transformer_engine_torch"

# What Transformer Engine 2.20 asks the extension while it is imported or makes a module: versions of libraries, those
# of CUDA 13, and two facts about streams.
_ANSWERS = {
    "get_cublasLt_version": 130000,
    "get_cudnn_version": 91900,
    "get_num_cublas_streams": 4,
    "get_stream_priority_range": (0, 0),
}


class _Enumeration(type):
    """A class whose members come into being when they are first named, each with the next number.

    The true numbers are in the compiled code. Transformer Engine's Python code compares members and counts them.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        cls.__members__ = {}

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = cls.__members__[name] = cls()
        member.value = len(cls.__members__) - 1
        setattr(cls, name, member)
        return member


class _Compiled:
    """An instance of a class of the extension: a member of an enumeration, or an object that holds nothing."""

    value = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __int__(self) -> int:
        return self.value


class InertExtension(types.ModuleType):
    """Has whatever is imported from it: classes by capitalized names, and functions that refuse to be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _ANSWERS:
            value = functools.partial(_answer, _ANSWERS[name])
        elif name[0].isupper():
            value = _Enumeration(name, (_Compiled,), {})
        else:
            value = functools.partial(_refuse, name)
        setattr(self, name, value)
        return value


def _answer(value: Any) -> Any:
    return value


def _refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{EXTENSION}.{name} is compiled and isn't here: Transformer Engine computes on a GPU only"
    )


def install() -> str:
    """Import Transformer Engine's Python code over an inert extension, for the rest of this process.

    Call it before Megatron Core is imported, which decides then whether there is a Transformer Engine.

    Returns:
        Transformer Engine's version.

    Raises:
        RuntimeError: Megatron Core is imported already.
        ModuleNotFoundError: The package `transformer-engine` is not on the path.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "found megatron.core imported; it has decided that there is no Transformer Engine: do this first"
        )
    # Transformer Engine's own switch: load no library.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    with warnings.catch_warnings():
        # It goes on without its part for PyTorch, whose extension isn't there, and says so.
        warnings.filterwarnings("ignore", "Detected a PyTorch installation", RuntimeWarning)
        import transformer_engine
    sys.modules[EXTENSION] = InertExtension(EXTENSION)
    transformer_engine.common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    return transformer_engine.__version__
