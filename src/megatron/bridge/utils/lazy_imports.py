# SPDX-License-Identifier: Apache-2.0
"""Imports of a package's `__init__` that wait until a name is used (PEP 562).

scientific-python's `lazy_loader` needs every name a second time, in a table or a stub. Here the imports stay what they
are, so that type checkers and editors read them, as with `etils.epy.lazy_api_imports`.
"""

import builtins
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


_ONE_PACKAGE = threading.RLock()


@dataclass(frozen=True)
class _Origin:
    """The module that a name comes from, and its name there."""

    module: str
    name: str

    def load(self) -> Any:
        module = importlib.import_module(self.module)
        try:
            return getattr(module, self.name)
        except AttributeError:
            return _submodule(self.module, self.name)


@contextmanager
def lazy_imports(package: str) -> Iterator[None]:
    """Make each `from … import …` statement of the block when one of its names is first used.

    The package gets a `__getattr__` and a `__dir__`, which know those names and the package's submodules:

        with lazy_imports(__name__):
            from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    Args:
        package: The `__name__` of the package whose `__init__` contains the block.
    """
    namespace = vars(sys.modules[package])
    import_now = builtins.__import__

    def defer(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> Any:
        # Other threads import other modules meanwhile.
        if globals is not namespace or not fromlist:
            return import_now(name, globals, locals, fromlist, level)
        source = importlib.util.resolve_name("." * level + name, package)
        return SimpleNamespace(**{each: _Origin(source, each) for each in fromlist})

    with _ONE_PACKAGE:
        builtins.__import__ = defer
        try:
            yield
        finally:
            builtins.__import__ = import_now
    origins = {name: value for name, value in namespace.items() if isinstance(value, _Origin)}
    for name in origins:
        del namespace[name]

    def attribute(name: str) -> Any:
        origin = origins.get(name, _Origin(package, name))
        value = _submodule(package, origin.name) if origin.module == package else origin.load()
        namespace[name] = value
        return value

    namespace["__getattr__"] = attribute
    namespace["__dir__"] = lambda: sorted({*namespace, *origins})


def _submodule(package: str, name: str) -> Any:
    """Import a submodule; a name that is none is a missing attribute."""
    submodule = f"{package}.{name}"
    is_possible = not name.startswith("__") and hasattr(sys.modules[package], "__path__")
    if not is_possible or importlib.util.find_spec(submodule) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(submodule)
