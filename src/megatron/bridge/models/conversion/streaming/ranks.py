# SPDX-License-Identifier: Apache-2.0
"""Loads `--ckpt-format torch` into a model of one rank: its tensors are pieces of the files of all ranks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.models.conversion.streaming.convert import Computed
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import Computing, NeedsValues, PiecewiseTensor
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.release_checkpoint.rank_files import Stored
from megatron.bridge.release_checkpoint.ranks import Ranks, Weight, own_name


_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_ADVICE = "Pass the Hugging Face model that was trained with --hf-model."


def load_ranks(payload: str | os.PathLike, model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Load the weights of all ranks into the model of one rank, in the dtype in which they are stored.

    Args:
        payload: Payload folder of the format torch, a local path.
        model: The chunks of the model, of which there is one.

    Returns:
        The model's state dict, in the section "model".

    Raises:
        ValueError: The files and the model don't fit, or the files don't fit together.
    """
    chunk, *others = unwrap_model(list(model))
    if others or torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(f"{payload} has the format torch, which is read by one process. Start it without torchrun.")
    state = chunk.state_dict(keep_vars=True)
    for name, value in weights_of_ranks(payload, state).items():
        # Megatron Core casts what it loads to the dtype of the parameter. Nothing that was trained is to be lost.
        state[name].data = value.materialize()
    return {"model": {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}}


def weights_of_ranks(payload: str | os.PathLike, state: Mapping[str, Any]) -> dict[str, PiecewiseTensor]:
    """Return the weights that the files of all ranks have for a model of one rank, by their names in its state dict.

    Reads no values, except those that several ranks have, which must be equal.

    Args:
        payload: Payload folder of the format torch, a local path.
        state: The model's state dict, with values or without.

    Raises:
        ValueError: As `load_ranks`.
    """
    ranks = Ranks(Path(payload))
    if ranks.missing:
        raise ValueError(f"{payload} lacks {ranks.missing[0]}. Copy the checkpoint again.")
    wanted = {own_name(name): name for name, value in state.items() if isinstance(value, torch.Tensor)}
    wanted = {own: name for own, name in wanted.items() if not own.endswith("_extra_state")}
    if lacks := sorted(wanted.keys() - ranks.weights.keys()):
        raise ValueError(f"{payload} lacks {_some(lacks)}, which the model has. {_ADVICE}")
    if left := sorted(ranks.weights.keys() - wanted.keys()):
        raise ValueError(f"{payload} has {_some(left)}, which the model lacks. {_ADVICE}")
    return {name: _fitted(payload, own, ranks.weights[own], state[name]) for own, name in wanted.items()}


def _fitted(payload: str | os.PathLike, name: str, weight: Weight, parameter: torch.Tensor) -> PiecewiseTensor:
    """Return a weight in the shape of a parameter."""
    for kept, copy in weight.copies:
        if not _same(_stored(kept), _stored(copy)):
            raise ValueError(
                f"{copy.file} has other values of {name} than {kept.file}, and both stand for the same tensor. "
                "Save the checkpoint again."
            )
    value, shape = tensor_of(weight), tuple(parameter.shape)
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
