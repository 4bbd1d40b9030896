# SPDX-License-Identifier: Apache-2.0
"""Defers what Megatron Core and transformers import and a conversion never uses, in the process of a subcommand.

Nothing is missing: a package is imported as usual when one of its names is used.
"""

import functools
import gc
import importlib
import importlib.abc
import importlib.util
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from megatron.bridge.utils.lazy_imports import lazy_imports


PACKAGES = (
    *("accelerate", "datasets", "megatron.energon", "modelopt", "multistorageclient", "pandas", "scipy", "sklearn"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "wandb"),
)
"""Packages for training, generation, quantization and object storage."""
PARENTS = ("megatron.training", "megatron.training.models")
"""Packages whose `__init__` imports a training loop, and of which a conversion uses submodules."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import AutoBridge in this block. What is deferred stays so after it."""
    sys.meta_path[:0] = [_StandIn(package) for package in PACKAGES if importlib.util.find_spec(package)]
    _compile_when_called()
    for package in PARENTS:
        if package not in sys.modules and (spec := importlib.util.find_spec(package)) and spec.loader:
            sys.modules[package] = module = importlib.util.module_from_spec(spec)
            with lazy_imports(package):
                spec.loader.exec_module(module)
    # Collecting garbage among modules, which all stay, takes a fifth of the time.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _compile_when_called() -> None:
    """Let `torch.compile` wait until a function is called: the decorator alone imports torch._inductor."""
    import torch

    @functools.wraps(compile_now := torch.compile)
    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if not hasattr(model, "__code__"):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules of a package without their code, until one of their names is used."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if f"{name}.".startswith(f"{self.package}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = functools.partial(self.attribute, module.__name__)

    def attribute(self, module: str, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        later = self in sys.meta_path and name != "__version__"
        return _Later(self, module, name) if later else self.real(module, name)

    def real(self, module: str, name: str) -> Any:
        """Import the package, and return an attribute of one of its modules."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            for each in [each for each in sys.modules if f"{each}.".startswith(f"{self.package}.")]:
                del sys.modules[each]
        found = importlib.import_module(module)
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


class _Later:
    """Stands for an attribute of a deferred module, and becomes it when it is called, subclassed or looked into."""

    def __init__(self, stand_in: _StandIn, module: str, name: str):
        self._stand_in, self._origin = stand_in, (module, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._stand_in.real(*self._origin), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stand_in.real(*self._origin)(*args, **kwargs)

    def __getitem__(self, item: Any) -> Any:
        return self._stand_in.real(*self._origin)[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stand_in.real(*self._origin))

    def __bool__(self) -> bool:
        return bool(self._stand_in.real(*self._origin))

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self._stand_in.real(*self._origin),)

    def __instancecheck__(self, instance: Any) -> bool:
        # A class that was never imported has no instances, and Bridge asks this of every module of a model.
        return self._stand_in not in sys.meta_path and isinstance(instance, self._stand_in.real(*self._origin))

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._stand_in not in sys.meta_path and issubclass(subclass, self._stand_in.real(*self._origin))

    def __or__(self, other: Any) -> Any:
        return typing.Any | other

    __ror__ = __or__
