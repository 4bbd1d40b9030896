# SPDX-License-Identifier: Apache-2.0
"""Import Transformer Engine's Python code without its compiled libraries, on a host without a GPU.

`transformer-engine` on PyPI is Transformer Engine's Python code, the same on every GPU. `transformer-engine-cu13` and
`transformer-engine-torch` have the compiled code. `install()` replaces the extension `transformer_engine_torch` with a
module that computes nothing, so that Transformer Engine's modules can be made. Python code decides their parameters,
extra states, and names. A call of a compiled function is an error.
"""

import functools
import importlib
import os
import sys
import types
import warnings
from typing import Any, NoReturn


EXTENSION = "transformer_engine_torch"

# What Transformer Engine 2.20 asks the extension at its import or while it makes a module: versions of libraries, here
# those of CUDA 13, and two facts about streams.
_ANSWERS = {
    "get_cublasLt_version": 130000,
    "get_cudnn_version": 91900,
    "get_num_cublas_streams": 4,
    "get_stream_priority_range": (0, 0),
}


class _Enumeration(type):
    """A class whose members are made at their first use, with consecutive numbers.

    Only the compiled code knows the real numbers. Transformer Engine's Python code compares and counts members.
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
    """An instance of a class of the extension: a member of an enumeration, or an empty object."""

    value = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __int__(self) -> int:
        return self.value


class InertExtension(types.ModuleType):
    """A module with every name: capitalized names are classes, other names are functions that raise an error."""

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
        f"{EXTENSION}.{name} is compiled and not available: Transformer Engine computes only on a GPU"
    )


def install() -> str:
    """Import Transformer Engine's Python code with the inert extension, for the rest of this process.

    Call it before Megatron Core is imported, because that import decides whether there is a Transformer Engine.

    Returns:
        Transformer Engine's version.

    Raises:
        RuntimeError: Megatron Core is already imported.
        ModuleNotFoundError: The package `transformer-engine` is not on the path.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "found megatron.core imported, which has decided that there is no Transformer Engine; call install() first"
        )
    # With this setting, Transformer Engine loads no library.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    with warnings.catch_warnings():
        # It warns that its PyTorch part has no extension, and continues.
        warnings.filterwarnings("ignore", "Detected a PyTorch installation", RuntimeWarning)
        import transformer_engine
    sys.modules[EXTENSION] = InertExtension(EXTENSION)
    transformer_engine.common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    return transformer_engine.__version__
