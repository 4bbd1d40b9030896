# SPDX-License-Identifier: Apache-2.0
"""Modules that stand for those of a package, until one of their names is used."""

import functools
import importlib
import importlib.abc
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class DeferredPackage(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules of a package without their code, until one of their names is used.

    Args:
        package: The name of the package.
        answers: What functions of the package do until then, by name. NotImplemented leaves it to the real one.
    """

    def __init__(self, package: str, answers: Mapping[str, Callable[..., Any]]):
        self.package, self.answers = package, answers

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: D102
        return ModuleSpec(name, self, is_package=True) if f"{name}.".startswith(f"{self.package}.") else None

    def exec_module(self, module: ModuleType) -> None:  # noqa: D102
        module.__getattr__ = functools.partial(self.attribute, module.__name__)

    def attribute(self, module: str, name: str) -> Any:
        """Return what stands for an attribute of a module."""
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _Later(self, module, name) if self.is_active and name != "__version__" else self.real(module, name)

    @property
    def is_active(self) -> bool:
        """Whether the package isn't in use yet."""
        return self in sys.meta_path

    def forget(self) -> None:
        """Make the package one that nothing has imported."""
        for each in [each for each in sys.modules if f"{each}.".startswith(f"{self.package}.")]:
            del sys.modules[each]

    def real(self, module: str, name: str) -> Any:
        """Import the package, and return an attribute of one of its modules."""
        if self.is_active:
            sys.meta_path.remove(self)
            self.forget()
        found = importlib.import_module(module)
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


class _Later:
    """Stands for an attribute of a module, and becomes it when it is called, subclassed or looked into."""

    def __init__(self, package: DeferredPackage, module: str, name: str):
        self._package, self._origin = package, (module, name)

    def _real(self) -> Any:
        return self._package.real(*self._origin)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._package.answers.get(self._origin[1]) if self._package.is_active else None
        answered = answer(*args, **kwargs) if answer else NotImplemented
        return self._real()(*args, **kwargs) if answered is NotImplemented else answered

    def __getitem__(self, item: Any) -> Any:
        return self._real()[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __bool__(self) -> bool:
        return bool(self._real())

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self._real(),)

    def __instancecheck__(self, instance: Any) -> bool:
        # A class that was never imported has no instances, and Bridge asks this of every module of a model.
        return not self._package.is_active and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return not self._package.is_active and issubclass(subclass, self._real())

    def __or__(self, other: Any) -> Any:
        return typing.Any | other

    __ror__ = __or__
