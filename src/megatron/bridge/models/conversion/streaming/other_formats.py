# SPDX-License-Identifier: Apache-2.0
"""Loads Megatron-LM's formats torch and torch_dcp into a model of one rank: its tensors are pieces of their files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron.bridge.models.conversion.streaming.checkpoint import StoredTensors
from megatron.bridge.models.conversion.streaming.convert import Computed
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import Computing, NeedsValues, PiecewiseTensor
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.release_checkpoint.layout import METADATA_JSON, as_path
from megatron.bridge.release_checkpoint.metadata import Metadata
from megatron.bridge.release_checkpoint.payload import examine_payload
from megatron.bridge.release_checkpoint.rank_files import Stored
from megatron.bridge.release_checkpoint.ranks import Ranks, Weight, own_name
from megatron.bridge.training import untrusted_checkpoint


_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MODEL = "model."
_ADVICE = "Pass the Hugging Face model that was trained (--hf-model)."


def load_other_format(payload: str | os.PathLike, model: Sequence[torch.nn.Module]) -> dict[str, Any] | None:
    """Load a payload that is not torch_dist into the model of one rank, in the dtype in which its weights are stored.

    Args:
        payload: Payload folder.
        model: The chunks of the model, of which there is one.

    Returns:
        The model's state dict, in the section "model". None if the payload may be torch_dist; nothing is loaded then.

    Raises:
        ValueError: As `other_weights`, or there are several ranks.
    """
    if (as_path(payload) / METADATA_JSON).exists():
        return None
    chunk, *others = unwrap_model(list(model))
    state = chunk.state_dict(keep_vars=True)
    if (values := other_weights(payload, state)) is None:
        return None
    if others or torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(f"{payload} is not torch_dist, and is read by one process. Start it without torchrun.")
    for name, value in values.items():
        # Megatron Core casts what it loads to the dtype of the parameter. Nothing that was trained is to be lost.
        state[name].data = value.materialize()
    return {"model": {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}}


def other_weights(payload: str | os.PathLike, state: Mapping[str, Any]) -> dict[str, PiecewiseTensor] | None:
    """Return the weights that a payload has for a model of one rank, by their names in its state dict.

    Reads no values, except those that several ranks have, which must be equal.

    Args:
        payload: Payload folder.
        state: The model's state dict, with values or without.

    Returns:
        None if the payload may be torch_dist.

    Raises:
        ValueError: The payload and the model don't fit, its files don't fit together, or its format is not read.
    """
    if (as_path(payload) / METADATA_JSON).exists():
        return None
    found = examine_payload(Path(payload))
    if found.format not in ("torch", "torch_dcp", "fsdp_dtensor"):
        return None
    if found.damage:
        raise ValueError(found.damage[0])
    if found.format == "fsdp_dtensor":
        raise ValueError(
            f"{payload} has the format fsdp_dtensor, which is not read. Load it with Megatron-LM, and save it with "
            "--ckpt-format torch_dist."
        )
    if found.ranks is not None:
        stored = {name: _merged_ranks(found.ranks, name) for name in found.ranks.weights}
    else:
        assert found.metadata is not None, "there would be damage"
        stored = _entries(payload, found.metadata)
    wanted = {own_name(name): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    wanted = {own: name for own, name in wanted.items() if not own.endswith("_extra_state")}
    if lacks := sorted(wanted.keys() - stored.keys()):
        raise ValueError(f"{payload} lacks {_some(lacks)}, which the model has. {_ADVICE}")
    if left := sorted(stored.keys() - wanted.keys()):
        raise ValueError(f"{payload} has {_some(left)}, which the model lacks. {_ADVICE}")
    return {name: _fitted(payload, own, stored[own], state[name]) for own, name in wanted.items()}


def _entries(payload: str | os.PathLike, metadata: Metadata) -> dict[str, PiecewiseTensor]:
    """Return the tensors of torch_dcp by the names of Megatron Core's own modules."""
    with untrusted_checkpoint.reading(payload):
        stored = StoredTensors(payload)
    found = {}
    for key, (shape, dtype) in metadata.tensors.items():
        if key.startswith(_MODEL) and not key.endswith("_extra_state"):
            like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            found[own_name(key.removeprefix(_MODEL))] = stored.part(ShardedTensor.from_rank_offsets(key, like))
    return found


def _merged_ranks(ranks: Ranks, name: str) -> PiecewiseTensor:
    weight = ranks.weights[name]
    for kept, copy in weight.copies:
        if not _same(_stored(kept), _stored(copy)):
            raise ValueError(
                f"{copy.file} has other values of {name} than {kept.file}, and both stand for the same tensor. "
                "Save the checkpoint again."
            )
    return tensor_of(weight)


def _fitted(payload: str | os.PathLike, name: str, value: PiecewiseTensor, parameter: torch.Tensor) -> PiecewiseTensor:
    """Return a weight in the shape of a parameter."""
    shape = tuple(parameter.shape)
    if name in _VOCABULARY and value.shape[1:] == parameter.shape[1:] and len(value) > len(parameter):
        # Rows that pad the vocabulary to a multiple of the number of ranks.
        value = value[: len(parameter)]
    if tuple(value.shape) != shape:
        raise ValueError(f"{payload} has {name} in the shape {tuple(value.shape)}, the model in {shape}. {_ADVICE}")
    return value


def tensor_of(weight: Weight) -> PiecewiseTensor:
    """Return a tensor of the whole model as pieces of the ranks' files, or as one that is computed when it is read."""
    try:
        return _merged(weight)
    except NeedsValues:
        dtype = getattr(torch, weight.dtype)
        return PiecewiseTensor.of(Computed(lambda: _compute(weight), dtype), weight.shape)


def _compute(weight: Weight) -> PiecewiseTensor:
    with Computing():
        return PiecewiseTensor.wrap(_merged(weight))


def _merged(weight: Weight) -> Any:
    parts: list[torch.Tensor] = [_stored(part) for part in weight.parts]
    if weight.gated:
        parts = [part.chunk(2)[half] for half in range(2) for part in parts]
    return torch.cat(parts, weight.dimension) if len(parts) > 1 else parts[0]


def _stored(part: Stored) -> torch.Tensor:
    in_file = InFile(part.file, part.offset, getattr(torch, part.dtype))
    if part.transposed:
        return PiecewiseTensor.of(in_file, part.shape[::-1]).t().contiguous()
    return PiecewiseTensor.of(in_file, part.shape)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes; NaN is not equal to itself."""
    with Computing():
        first, second = (PiecewiseTensor.wrap(each).materialize().view(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
