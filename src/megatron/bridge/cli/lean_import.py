# SPDX-License-Identifier: Apache-2.0
"""Imports AutoBridge and the bridge of one architecture, for a process that converts one checkpoint and ends.

`import megatron.bridge` registers every family, and imports what training needs besides. In a process that
calls `auto_bridge_for` first, and only there,

- the packages that gather others' names (`GATHERING`) hand a name out when it is asked for;
- packages that a conversion has no use for (`UNUSED`) are stood in for until something uses them;
- `torch.compile` compiles a function when it is first called: Megatron Core decorates some forty, and the decoration
  alone imports torch._inductor;
- transformers reads the sources of all its models once and not twice, and doesn't look for every file that is
  installed.

Nothing is missing: what is used after all is imported then, and for a model whose bridge isn't found in the sources
`megatron.bridge` is imported whole.
"""

import ast
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


if typing.TYPE_CHECKING:
    from megatron.bridge import AutoBridge


AUTO_BRIDGE = "megatron.bridge.models.conversion.auto_bridge"

GATHERING = (
    "megatron.bridge.data",
    "megatron.bridge.diffusion",
    "megatron.bridge.diffusion.models",
    "megatron.bridge.models",
    "megatron.training",
    "megatron.training.models",
)
"""Packages whose `__init__` imports names from elsewhere and does nothing else that a conversion needs."""

UNUSED = (
    "accelerate",
    "datasets",
    "megatron.energon",
    "modelopt",
    "multistorageclient",
    "pandas",
    "scipy",
    "sklearn",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "wandb",
)
"""Packages that Bridge, Megatron Core and transformers import for training, generation, quantization, object storage.
"""


def auto_bridge_for(hf_model: str, **kwargs: Any) -> type["AutoBridge"]:
    """Import AutoBridge and the bridge that converts this model.

    It changes how the process imports. Where AutoBridge is imported already it changes nothing.

    Args:
        hf_model: A folder with a `config.json`, or a name on the Hugging Face hub.
        **kwargs: What transformers needs to find the configuration (`revision`, `token`, …).

    Returns:
        The class. Registered with it are the bridges of the module that names the model's architecture, or all.
    """
    if AUTO_BRIDGE not in sys.modules:
        with _without_collecting_garbage(), _Distributions.in_place():
            sys.meta_path.insert(0, finder := _Finder())
            modules = registering(_architectures(hf_model, **kwargs))
            if len(modules) != 1:
                finder.end()
            else:
                _compile_on_call()
                # In this order, for the imports of some bridges go round in a ring otherwise: Flux's.
                for module in (AUTO_BRIDGE, *modules):
                    importlib.import_module(module)
    return importlib.import_module("megatron.bridge").AutoBridge


def _architectures(hf_model: str, **kwargs: Any) -> set[str]:
    """The names that AutoBridge may look a bridge up by."""
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(hf_model, **kwargs)
    remote = [name for name in (config.get("auto_map") or {}).values() if isinstance(name, str)]
    return {*(config.get("architectures") or []), *(name.rpartition(".")[2] for name in remote)}


def registering(architectures: set[str]) -> list[str]:
    """Find the modules that register a bridge for an architecture, in their sources.

    Args:
        architectures: Names of model classes of transformers, such as `LlamaForCausalLM`.

    Returns:
        Names of modules below `megatron.bridge`, sorted. Registrations whose `source` is no plain name or string go
        unseen.
    """
    (root,) = importlib.util.find_spec("megatron.bridge").submodule_search_locations
    found = []
    for path in sorted(Path(root).glob("*/**/*.py")):
        text = path.read_bytes()
        if b"register_bridge" not in text or not any(name.encode() in text for name in architectures):
            continue
        if not architectures.isdisjoint(_sources(ast.parse(text))):
            parts = path.relative_to(root).with_suffix("").parts
            found.append(".".join(("megatron.bridge", *parts)).removesuffix(".__init__"))
    return found


def _sources(module: ast.Module) -> Iterator[str]:
    """The value of `source` in calls of `register_bridge` and `register_bridge_implementation`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].startswith("register_bridge"):
            for value in (keyword.value for keyword in node.keywords if keyword.arg == "source"):
                yield value.value if isinstance(value, ast.Constant) else ast.unparse(value).rpartition(".")[2]


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Modules are kept anyway, and to look through them again and again takes a fifth of the time of an import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Distributions(Mapping):
    """What `importlib.metadata.packages_distributions` gives: to which distributions a package belongs.

    That one looks for every file of all distributions. This one does so for a package that is not named as its
    distribution is.
    """

    def __init__(self, look: Callable[[], Mapping[str, list[str]]]):
        self._all = functools.cache(look)

    @classmethod
    @contextmanager
    def in_place(cls) -> Iterator[None]:
        """Give these to who asks meanwhile: transformers, when it is imported."""
        look = importlib.metadata.packages_distributions
        importlib.metadata.packages_distributions = functools.partial(cls, look)
        try:
            yield
        finally:
            importlib.metadata.packages_distributions = look

    def __getitem__(self, package: str) -> list[str]:
        try:
            return [importlib.metadata.distribution(package).name]
        except importlib.metadata.PackageNotFoundError:
            return self._all()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def _compile_on_call() -> None:
    import torch

    compile_now = torch.compile

    @functools.wraps(compile_now)
    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if not hasattr(model, "__code__"):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later


class _Finder(importlib.abc.MetaPathFinder):
    """Gives gathering packages, unused ones and one of transformers' modules their loaders.

    All else is left to the finders behind it.
    """

    def __init__(self):
        self.stand_ins = [_StandIn(package) for package in UNUSED if _installed(package)]

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if loader := _LOADERS.get(fullname):
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None:
                spec.loader = loader(fullname, spec.origin)
            return spec
        for stand_in in self.stand_ins:
            if stand_in.covers(fullname):
                return importlib.machinery.ModuleSpec(fullname, stand_in, is_package=True)
        return None

    def end(self) -> None:
        """Import everything as ever from now on."""
        sys.meta_path.remove(self)
        for stand_in in self.stand_ins:
            stand_in.end()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _attribute(module: str, name: str) -> Any:
    """What `from module import name` gives."""
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        if not _installed(f"{module}.{name}"):
            raise
        return importlib.import_module(f"{module}.{name}")


class _Gathering(importlib.machinery.SourceFileLoader):
    """Passes by the imports of an `__init__`, and makes each when its name is asked for."""

    def exec_module(self, module: ModuleType) -> None:
        origins = dict(_imported(ast.parse(self.get_data(self.path)), module.__name__))

        def resolve(name: str) -> Any:
            if name not in origins:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            setattr(module, name, _attribute(*origins[name]))
            return vars(module)[name]

        module.__getattr__ = resolve


class _ScanningOnce(importlib.machinery.SourceFileLoader):
    """Has the sources of transformers' models read once: it asks for their folder, and then for a file in it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if scan := getattr(module, "create_import_structure_from_path", None):
            module.create_import_structure_from_path = lambda path: scan(
                os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
            )


_LOADERS = dict.fromkeys(GATHERING, _Gathering) | {"transformers.utils.import_utils": _ScanningOnce}


def _imported(module: ast.Module, package: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each name that an `__init__` imports or gives again, with the module and the attribute that it comes from."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield alias.asname or alias.name, (source, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            for target in node.targets:
                # A second name for one of those.
                yield ast.unparse(target), (package, node.value.id)


class _StandIn(importlib.abc.Loader):
    """Loads the modules of a package without their code, until something uses one of their attributes."""

    def __init__(self, package: str):
        self.package, self.active = package, True

    def covers(self, name: str) -> bool:
        return self.active and f"{name}.".startswith(f"{self.package}.")

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__") and name != "__version__":
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            if self.active and name != "__version__":
                return _Later(self, module.__name__, name)
            return self.real(module.__name__, name)

        module.__getattr__ = attribute

    def real(self, module: str, name: str) -> Any:
        """Return an attribute of a module of the package, which from now on is imported as ever."""
        self.end()
        return _attribute(module, name)

    def end(self) -> None:
        """Import the package as ever from now on."""
        for each in [each for each in sys.modules if self.covers(each)]:
            del sys.modules[each]
        self.active = False


class _Later:
    """Stands for an attribute of a module, which is imported when this is called, subclassed or looked into.

    In an annotation, which is compared and hashed, it is not, nor as the class that something is no instance of.
    """

    def __init__(self, stand_in: _StandIn, module: str, name: str):
        self._stand_in, self._origin = stand_in, (module, name)

    def _real(self) -> Any:
        return self._stand_in.real(*self._origin)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

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
        return not self._stand_in.active and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return not self._stand_in.active and issubclass(subclass, self._real())

    def __or__(self, other: Any) -> Any:
        return typing.Any | other

    __ror__ = __or__
