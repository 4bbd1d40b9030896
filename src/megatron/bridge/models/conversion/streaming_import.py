# SPDX-License-Identifier: Apache-2.0
"""Models whose weights stay in the Hugging Face checkpoint until a save reads them.

`streamed_model` makes a model on the meta device: it has layers, names, shapes and dtypes, and no weights. The
bridge's own mappings say which of Hugging Face's tensors each parameter is made of. A save asks for a parameter, or
for a part of one, when it writes it (training/streaming_save.py).
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.transformer import MegatronModule

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
from megatron.bridge.models.conversion.piecewise_tensor import IgnoreMeta, MappedFile, PiecewiseTensor, storage_of
from megatron.bridge.models.conversion.safetensors_header import DTYPES, StoredTensor, read_header
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)

_ATTRIBUTE = "streamed_weights"


class CannotStream(Exception):
    """Why a model can't be imported tensor by tensor."""


def streamed_model(bridge: "AutoBridge", target: str | os.PathLike) -> list[MegatronModule] | None:
    """Make the model of a bridge without its weights, for a save that streams them. Collective: every rank calls it.

    Args:
        bridge: A bridge with a checkpoint; its weights are neither read nor changed.
        target: Where the model will be saved.

    Returns:
        The model as `AutoBridge.to_megatron_model` gives it, on the meta device, or None where the model can't be
        streamed: an info line says why.
    """
    try:
        _check(bridge, target)
        with _told_apart("its model can't be made without weights"):
            model = _meta_model(bridge)
        weights = StreamedWeights(bridge, model)
        with _told_apart("its layout can't be told without weights"):
            weights.check(model)
    except CannotStream as reason:
        logger.info("%s is imported in memory, not streamed: %s", _name(bridge), reason)
        return None
    setattr(unwrap_model(model)[0], _ATTRIBUTE, weights)
    return model


def streamed_weights(model: list[MegatronModule]) -> "StreamedWeights | None":
    """Return where the weights of a model from `streamed_model` come from, or None for one that has its own."""
    weights = getattr(unwrap_model(model)[0], _ATTRIBUTE, None) if model else None
    return weights if isinstance(weights, StreamedWeights) else None


class StreamedWeights:
    """The weights of a model that has none, one parameter or a part of one at a time. Thread-safe.

    Args:
        bridge: The bridge that the model comes from.
        model: The chunks of the model.

    Raises:
        CannotStream: The checkpoint is not one of safetensors files, or no task can be made for it, or parameters
            share memory.
    """

    def __init__(self, bridge: "AutoBridge", model: list[MegatronModule]) -> None:
        self._bridge: MegatronModelBridge = bridge._model_bridge
        self._state = _MappedState(bridge.hf_pretrained.state.source)
        with _told_apart("its mappings need weights"):
            tasks = self._bridge.build_conversion_tasks(bridge.hf_pretrained, unwrap_model(model))
        self._tasks = {
            _storage(task.param_weight): task for task in tasks if task is not None and task.param_weight is not None
        }
        for task in self._tasks.values():
            if task.param_weight.untyped_storage().nbytes() != task.param_weight.nbytes:
                raise CannotStream(f"{task.param_name} shares its memory with other parameters")
        # Of a tensor that holds all experts of a layer, the bridge may have made another one.
        self._groups = _LastUsed()

    def check(self, model: list[MegatronModule]) -> None:
        """Raise `CannotStream` if a tensor of the model's checkpoint is neither there nor a part of a parameter."""
        for chunk in unwrap_model(model):
            state_dict = chunk.sharded_state_dict()
            apply_factories(state_dict)
            for entry in nested_values(state_dict):
                if isinstance(entry, ShardedTensor):
                    self._check(entry)
                elif not isinstance(entry, ShardedBase) and isinstance(entry, torch.Tensor) and entry.is_meta:
                    raise CannotStream("its checkpoint has tensors that are not sharded")

    def _check(self, entry: ShardedTensor) -> None:
        if entry.data is None or not entry.data.is_meta:
            return
        if _storage(entry.data) not in self._tasks:
            raise CannotStream(f"{entry.key} is not made of single parameters that the bridge maps")
        if not entry.data.is_contiguous():
            raise CannotStream(f"{entry.key} is not a contiguous part of a parameter")

    def resolve(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor of the model.

        Args:
            tensor: A parameter or buffer of the model, or a contiguous view of one.

        Returns:
            A `PiecewiseTensor` of its shape and dtype; `tensor` itself if the checkpoint has nothing for it.

        Raises:
            ValueError: The checkpoint's tensor has another shape than the model's, or no values, or `tensor` is not
                contiguous.
        """
        task = self._tasks.get(_storage(tensor))
        if task is None:
            return tensor
        if not tensor.is_contiguous():
            raise ValueError(
                f"the save asks for a part of {task.param_name} that is not contiguous: import with streaming=False"
            )
        value = self._convert(task)
        if value.is_meta:
            raise ValueError(
                f"the mapping of {task.mapping.hf_param} makes {task.param_name} on the model's device, which has no "
                "values: import with streaming=False"
            )
        if value.shape != task.param_weight.shape:
            raise ValueError(
                f"{task.mapping.hf_param} gives {task.param_name} the shape {tuple(value.shape)}, the model has "
                f"{tuple(task.param_weight.shape)}: compare config.json with the checkpoint's tensors"
            )
        value = PiecewiseTensor.wrap(value).cast(tensor.dtype)
        return value.range(tensor.storage_offset(), tensor.shape)

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


class _LastUsed:
    """Values of which each thread keeps the one that it used last, and shares it. Thread-safe."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._keys: dict[int, str] = {}
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            self._keys[threading.get_ident()] = key
            # Before another one is made.
            self._values = {each: self._values[each] for each in self._values if each in self._keys.values()}
            if key not in self._values:
                self._values[key] = make()
            return self._values[key]


class _MappedState(StateDict):
    """Hugging Face's tensors, as they lie in the safetensors files, which are mapped when they are first asked for."""

    def __init__(self, source: SafeTensorsStateSource) -> None:
        super().__init__(source)
        self._files: dict[str, _SafetensorsFile] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str) or (name := self.source.key_to_filename_map.get(key)) is None:
            return super().__getitem__(key)
        with self._lock:
            if name not in self._files:
                self._files[name] = _SafetensorsFile.open(self.source.path / name)
        return self._files[name].tensor(key)


@dataclass(frozen=True)
class _SafetensorsFile:
    """A mapped file in the safetensors format."""

    storage: torch.UntypedStorage
    entries: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "_SafetensorsFile":
        entries = read_header(path)
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return cls(storage_of(memory), entries)

    def tensor(self, name: str) -> PiecewiseTensor:
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise TypeError(f"{name} is of the type {entry.dtype}, which PyTorch has none for: convert it first")
        if entry.start == entry.stop:
            return PiecewiseTensor.wrap(torch.empty(entry.shape, dtype=dtype))
        flat = torch.empty(0, dtype=dtype).set_(self.storage[entry.start : entry.stop])
        return PiecewiseTensor.wrap(flat.view(entry.shape), MappedFile(self.storage, entry.start))


def _check(bridge: "AutoBridge", target: str | os.PathLike) -> None:
    if MultiStorageClientFeature.is_enabled() and str(target).startswith("msc://"):
        raise CannotStream("an object store takes whole files")
    own = type(bridge._model_bridge).load_weights_hf_to_megatron
    if own is not MegatronModelBridge.load_weights_hf_to_megatron:
        raise CannotStream("its bridge has a loader of its own")
    if not isinstance(bridge.hf_pretrained.state.source, SafeTensorsStateSource):
        raise CannotStream("its weights are not in safetensors files")


def _meta_model(bridge: "AutoBridge") -> list[MegatronModule]:
    provider = bridge.to_megatron_provider(load_weights=False)
    # As `to_megatron_provider` has it where weights are loaded.
    provider.perform_initialization = False
    if hasattr(provider, "finalize"):
        provider.finalize()
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    if any((getattr(provider, size, 1) or 1) > 1 for size in sizes):
        raise CannotStream("its provider asks for model parallelism")
    recorded = provider.init_model_with_meta_device
    # Megatron Core's own layers take the default device only if they are asked to be on the CPU, Transformer Engine's
    # only if not (core 0.19, tensor_parallel/layers.py and extensions/transformer_engine.py).
    model = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=not HAVE_TE, init_model_with_meta_device=True
    )
    provider.init_model_with_meta_device = recorded
    provider.use_cpu_initialization = True
    return model


@contextmanager
def _told_apart(reason: str) -> Iterator[None]:
    """Turn whatever a model that is not there raises into `CannotStream`: the import in memory has its own errors."""
    try:
        yield
    except CannotStream:
        raise
    except Exception as error:
        logger.debug(reason, exc_info=True)
        line = next(iter(str(error).strip().splitlines()), "")
        raise CannotStream(f"{reason} ({type(error).__name__}: {line})") from error


def _storage(tensor: torch.Tensor) -> int:
    """Tell the memory of a tensor, also of one on the meta device, from any other's as long as both live."""
    return tensor.untyped_storage()._cdata


def _name(bridge: "AutoBridge") -> str:
    return getattr(bridge.hf_pretrained, "model_name_or_path", None) or type(bridge._model_bridge).__name__
