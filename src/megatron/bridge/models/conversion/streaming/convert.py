# SPDX-License-Identifier: Apache-2.0
"""Makes a model's parameters of Hugging Face's tensors, by the bridge's own mappings."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.bridge.models.conversion import torch_files
from megatron.bridge.models.conversion.hf_files import read_file
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
from megatron.bridge.models.conversion.safetensors_header import DTYPES, StoredTensor
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import Computing, NeedsValues, PiecewiseTensor
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict


@dataclass(frozen=True, eq=False)
class Computed:
    """The elements of a tensor that is computed when it is read, each time anew."""

    compute: Callable[[], PiecewiseTensor]
    dtype: torch.dtype

    def blocks(self, start: int, stop: int, length: int) -> Iterator[torch.Tensor]:  # noqa: D102
        yield from self.compute().range(start, [stop - start]).blocks(length * self.dtype.itemsize)


class Conversion:
    """Makes parameters of a checkpoint's tensors, by the mappings of the bridge that made the tasks. Thread-safe."""

    def __init__(self, bridge: MegatronModelBridge, source: SafeTensorsStateSource) -> None:
        self._bridge = bridge
        self._state = StoredState(source)
        # Some bridges make a tensor of all experts of a layer of another one.
        self._groups = LastUsed()

    def plan(self, task: WeightConversionTask) -> PiecewiseTensor:
        """Return a parameter: the pieces of files that make it, or else one piece that is computed when it is read."""
        try:
            value = self._convert(task)
        except NeedsValues:
            value = None
        if isinstance(value, PiecewiseTensor) and value.in_files:
            return _checked(task, value)
        source = Computed(partial(self._compute, task), task.param_weight.dtype)
        return PiecewiseTensor.of(source, task.param_weight.shape)

    def _compute(self, task: WeightConversionTask) -> PiecewiseTensor:
        with Computing():
            return _checked(task, self._convert(task))

    def _convert(self, task: WeightConversionTask) -> torch.Tensor:
        name = task.mapping.hf_param
        with torch.no_grad(), IgnoreMeta():
            if getattr(task.mapping, "is_grouped_export", False):
                weights = self._groups.get(str(name), lambda: self._load(name))
            else:
                weights = self._load(name)
            return task.mapping.hf_to_megatron(weights, task.megatron_module)

    def _load(self, name: Any) -> Any:
        return self._bridge.maybe_modify_loaded_hf_weight(name, self._state)


def _checked(task: WeightConversionTask, value: torch.Tensor) -> PiecewiseTensor:
    if value.shape != task.param_weight.shape:
        raise ValueError(
            f"{task.mapping.hf_param} gives {task.param_name} the shape {tuple(value.shape)}, the model has "
            f"{tuple(task.param_weight.shape)}: compare config.json with the checkpoint's tensors"
        )
    return PiecewiseTensor.wrap(value).cast(task.param_weight.dtype)


class IgnoreMeta(TorchDispatchMode):
    """Leaves tensors where they are when a mapping moves them to the meta device, where the model is."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            if kwargs.get("dtype") in (None, args[0].dtype):
                return args[0]
        return func(*args, **kwargs)


class StoredState(StateDict):
    """Hugging Face's tensors as they are stored in the files of their weights."""

    def __init__(self, source: SafeTensorsStateSource) -> None:
        super().__init__(source)
        self._headers: dict[Path, Mapping[str, StoredTensor]] = {}
        # Otherwise each question goes through a list, of 90,000 names in DeepSeek-V3.
        self._names = frozenset(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def get(self, key: str, default: Any = None) -> Any:  # noqa: D102
        return self._load_tensors([key])[key] if key in self else default

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str) or (name := self.source.key_to_filename_map.get(key)) is None:
            return super().__getitem__(key)
        path = self.source.path / name
        if path not in self._headers:
            self._headers[path] = read_file(path)
        stored = self._headers[path][key]
        if stored.dtype not in DTYPES:
            raise TypeError(f"{key} in {path} has the dtype {stored.dtype}, which PyTorch lacks: convert it first")
        dtype = DTYPES[stored.dtype]
        in_place = stored.start >= 0
        values = InFile(path, stored.start, dtype) if in_place else Computed(partial(_loaded, path, key), dtype)
        tensor = PiecewiseTensor.of(values, stored.shape)
        # The source of a model with an adapter merges it (adapter.py, AdaptedSource).
        merged = getattr(self.source, "merged", None)
        return tensor if merged is None else merged(key, tensor)


def _loaded(path: Path, name: str) -> PiecewiseTensor:
    return PiecewiseTensor.wrap(torch_files.load(path)[name])


class LastUsed:
    """Values of which each thread keeps the one that it used last, and shares it with the others. Thread-safe."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[str, Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value of a key. It is made if no thread keeps it."""
        thread = threading.get_ident()
        with self._lock:
            found = next((value for value in self._values.values() if value[0] == key), None)
            # Before another one is made.
            self._values.pop(thread, None)
            self._values[thread] = found or (key, make())
            return self._values[thread][1]
