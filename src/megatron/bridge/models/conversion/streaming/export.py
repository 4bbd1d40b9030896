# SPDX-License-Identifier: Apache-2.0
"""Plans an export: which bytes of the Megatron checkpoint make which tensor of the Hugging Face model.

The model is made without weights, and its parameters are pieces of the checkpoint's files (`load.py`). The bridge's
own export runs on them, one parameter at a time. What it only rearranges stays a list of pieces, and what it computes
is computed when it is written.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.bridge.models.conversion import export_account, trained_config
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
from megatron.bridge.models.conversion.streaming.convert import Computed, LastUsed, StoredState
from megatron.bridge.models.conversion.streaming.model import CannotStream, cannot_stream_if_it_fails
from megatron.bridge.models.conversion.streaming.tensor import Computing, NeedsValues, PiecewiseTensor
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.bridge.release_checkpoint.layout import METADATA, RANKS, resolve_checkpoint


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

logger = logging.getLogger(__name__)

_DATA = ("*.distcp", "mp_rank_*/model_optim_rng.pt")


class StreamedModel(list):
    """The chunks of a model whose parameters are read when they are used.

    Attributes:
        streamed_tensors: The tensors of the Hugging Face model by name, read and converted when they are used.
    """

    streamed_tensors: dict[str, torch.Tensor]


def plan_export(bridge: "AutoBridge", checkpoint: str | os.PathLike) -> StreamedModel | None:
    """Plan an export.

    Args:
        bridge: The bridge that exports.
        checkpoint: Checkpoint root or payload folder.

    Returns:
        The model, for `AutoBridge.save_hf_pretrained`. None if the export can't be streamed; a warning says why.

    Raises:
        ValueError: The checkpoint and the model don't fit.
    """
    payload = Path(resolve_checkpoint(checkpoint))
    try:
        _check(bridge, checkpoint)
        model = StreamedModel(
            bridge.load_megatron_model(payload, streaming=True, mp_overrides=trained_config.overrides(bridge))
        )
        conversion = Conversion(bridge, chunks := unwrap_model(model))
        with cannot_stream_if_it_fails("its mappings need weights"):
            tasks = conversion.tasks()
        export_account.check_used(bridge._model_bridge, chunks, tasks)
        with cannot_stream_if_it_fails("its mappings need weights"):
            model.streamed_tensors = conversion.plan(tasks)
    except CannotStream as reason:
        size = sum(file.stat().st_size for pattern in _DATA for file in payload.glob(pattern))
        memory = f" It takes about {size / 1e6:,.0f} MB of memory, the size of its files." if size else ""
        logger.warning("%s is exported in memory, not streamed: %s.%s", checkpoint, reason, memory)
        return None
    return model


def _check(bridge: "AutoBridge", checkpoint: str | os.PathLike) -> None:
    if export_account.ranks_hold_parts():
        raise CannotStream("several ranks hold parts of the model")
    if MultiStorageClientFeature.is_enabled() and str(checkpoint).startswith("msc://"):
        raise CannotStream("it is in an object store")
    own = type(bridge._model_bridge).stream_weights_megatron_to_hf
    if own is not MegatronModelBridge.stream_weights_megatron_to_hf:
        raise CannotStream("its bridge has an export of its own")
    payload = Path(resolve_checkpoint(checkpoint))
    if not (payload / METADATA).is_file() and not any(payload.glob(RANKS)):
        raise CannotStream("it is not a distributed checkpoint")


class Conversion:
    """Makes Hugging Face's tensors of a model's parameters, by the mappings of its bridge. Thread-safe."""

    def __init__(self, bridge: "AutoBridge", chunks: list) -> None:
        self._bridge = bridge._model_bridge
        self._chunks = chunks
        self._source = _Source(bridge.hf_pretrained) if _has_files(bridge.hf_pretrained) else bridge.hf_pretrained
        self._results = LastUsed()

    def tasks(self) -> list[WeightConversionTask | None]:
        """Return what the bridge makes of each parameter."""
        return self._bridge.build_conversion_tasks(self._source, self._chunks)

    def plan(self, given: Sequence[WeightConversionTask | None]) -> dict[str, torch.Tensor]:
        """Return the tensors by name: pieces of files, or else pieces that are computed when they are read."""
        tensors: dict[str, torch.Tensor] = {}
        for tasks in _groups(given):
            try:
                with _Rearranging():
                    tensors |= self._convert(tasks)
            except (NeedsValues, NotImplementedError):
                tensors |= self._computed(tasks)
        return tensors

    def _computed(self, tasks: Sequence[WeightConversionTask]) -> dict[str, torch.Tensor]:
        shapes = [replace(task, param_weight=torch.empty_like(task.param_weight, device="meta")) for task in tasks]
        return {
            name: PiecewiseTensor.of(Computed(partial(self._compute, tasks, name), tensor.dtype), tensor.shape)
            for name, tensor in self._convert(shapes).items()
        }

    def _compute(self, tasks: Sequence[WeightConversionTask], name: str) -> PiecewiseTensor:
        with Computing():
            tensors = self._results.get(tasks[0].global_param_name, lambda: self._convert(tasks))
        return PiecewiseTensor.wrap(tensors[name])

    def _convert(self, tasks: Sequence[WeightConversionTask]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(
                self._bridge.stream_weights_megatron_to_hf(
                    self._chunks,
                    self._source,
                    cpu=False,
                    show_progress=False,
                    conversion_tasks=list(tasks),
                    merge_adapter_weights=False,
                )
            )


def _groups(tasks: Sequence[WeightConversionTask | None]) -> Iterator[list[WeightConversionTask]]:
    """Yield tasks that make tensors together: the experts of a layer in one tensor, or a task alone."""
    groups: dict[str, list[WeightConversionTask]] = defaultdict(list)
    for task in tasks:
        if task is not None:
            together = getattr(task.mapping, "is_grouped_export", False)
            groups[str(task.mapping.hf_param) if together else task.global_param_name].append(task)
    yield from groups.values()


def _has_files(hf_pretrained: Any) -> bool:
    source = getattr(getattr(hf_pretrained, "state", None), "source", None)
    return isinstance(source, SafeTensorsStateSource)


class _Source:
    """A Hugging Face model whose tensors are not read: an export may ask for their shapes."""

    def __init__(self, hf_pretrained: Any) -> None:
        self._pretrained = hf_pretrained
        self.state = StoredState(hf_pretrained.state.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pretrained, name)


class _Rearranging(TorchDispatchMode):
    """Rearranges piecewise tensors in two further ways that read nothing.

    A copy is the tensor itself: a mapping that writes to it raises NotImplementedError. Rows are chosen, as those of
    queries, keys and values.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], PiecewiseTensor):
            if func is torch.ops.aten.clone.default:
                return args[0]
            if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.int64:
                return _rows(args[0], args[1][0])
        return func(*args, **(kwargs or {}))


def _rows(tensor: PiecewiseTensor, indices: torch.Tensor) -> PiecewiseTensor:
    row, positions = tensor.shape[1:], range(len(tensor))
    parts = [tensor.range(positions[at] * row.numel(), row) for at in indices.flatten().tolist()]
    return PiecewiseTensor([piece for part in parts for piece in part.pieces], (*indices.shape, *row), tensor.dtype)
