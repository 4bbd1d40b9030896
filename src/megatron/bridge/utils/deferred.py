# SPDX-License-Identifier: Apache-2.0
"""Defers what Megatron Core and transformers import and a conversion never uses, in a process of our own.

Nothing is missing: a package is imported as usual when one of its names is used.
"""

import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.bridge.models.conversion import families
from megatron.bridge.utils.deferred_package import DeferredPackage
from megatron.bridge.utils.deferred_scans import short_scans
from megatron.bridge.utils.lazy_imports import lazy_imports


AUTO_BRIDGE = "megatron.bridge.models.conversion.auto_bridge"
COMPILER = "torch._dynamo"
SYMBOLS = "torch.fx.experimental.symbolic_shapes"
PACKAGES = (
    *("accelerate", "datasets", "httpx._main", "megatron.energon", "modelopt", "multistorageclient", "pandas"),
    *("scipy", "sklearn", "sympy", COMPILER, SYMBOLS, "torch.distributed.elastic", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.distributions", "torch.utils.cpp_extension"),
    *("torch.utils.tensorboard", "torchvision.datasets", "torchvision.models", "torchvision.ops", "wandb"),
)
"""Packages for training, generation, quantization and object storage."""
PARENTS = ("megatron.training", "megatron.training.models", "megatron.training.utils")
"""Packages whose `__init__` imports a training loop, and of which a conversion uses submodules."""


def _known(value: Any) -> Any:
    return value if type(value) is bool else NotImplemented


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    return function or _undecorated


ANSWERS: dict[str, Mapping[str, Callable[..., Any]]] = {
    # What isn't compiled needs no marks for the compiler.
    COMPILER: dict.fromkeys(["allow_in_graph", "assume_constant_result", "disable"], _undecorated),
    # Shapes are plain numbers where nothing is traced.
    SYMBOLS: dict.fromkeys(["expect_true", "guard_or_false", "guard_or_true"], _known)
    | {"is_nested_int": lambda size: False if type(size) is int else NotImplemented},
    "modelopt": {
        "is_quantized": lambda model: False,
        "restore_modelopt_state": lambda model, state: (
            NotImplemented if any(name.startswith("modelopt_state") for name in state) else None
        ),
    },
}
"""What functions of a package do as long as nothing of the package is in use."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import AutoBridge in this block. What is deferred stays so after it."""
    # The process may have imported some of them, or have been here before.
    deferred = {each.package: each for each in sys.meta_path if isinstance(each, DeferredPackage)}
    wanted = [name for name in PACKAGES if name not in sys.modules and name not in deferred]
    new = {name: DeferredPackage(name, ANSWERS.get(name, {})) for name in wanted if _exists(name)}
    sys.meta_path[:0] = new.values()
    deferred |= new
    short_scans()
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
        # AutoBridge imports what it converts with when it is used, which is after the block.
        if AUTO_BRIDGE in sys.modules:
            families.import_configs()
    finally:
        # torch.distributed uses the compiler if it finds it imported.
        if COMPILER in deferred and deferred[COMPILER].is_active:
            deferred[COMPILER].forget()
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


def _exists(name: str) -> bool:
    """Return whether a module is installed. Unlike `find_spec`, this imports no parent of it."""
    top, *rest = name.split(".")
    if (spec := importlib.util.find_spec(top)) is None:
        return False
    places = [Path(each, *rest) for each in spec.submodule_search_locations or []]
    return not rest or any(each.is_dir() or each.with_suffix(".py").is_file() for each in places)
