# SPDX-License-Identifier: Apache-2.0
"""Accounts for an export: the checkpoint's tensors are the model's, and what is written are transformers' tensors."""

import copy
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from megatron.bridge.models.conversion import accounting, trained_config
from megatron.bridge.models.conversion.hf_files import some
from megatron.bridge.models.conversion.safetensors_header import in_one_line
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.bridge.release_checkpoint import weights
from megatron.bridge.release_checkpoint.layout import METADATA
from megatron.bridge.release_checkpoint.metadata import read_metadata


if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

logger = logging.getLogger(__name__)

_HINT = "pass the trained Hugging Face model with --hf-model (source_path)"
_LENIENT = "pass strict=False (--no-strict) to export without"
# What stands beside quantized weights.
_SCALE = re.compile(r"(_scale|_scale_inv|_scale_2|\.scale|_amax)$|_quantizer\.")
_NO_WEIGHT = re.compile(r"_extra_state|_quantizer\.")
# What a model class raises for a config that isn't of its kind, or that it doesn't know in this version.
_NO_MODEL = (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)
# None while nothing is exported.
_strict: ContextVar[bool | None] = ContextVar("strict_export", default=None)
# What `expected_of` has found for the export that runs.
_found: ContextVar[list["Expected | None"]] = ContextVar("expected_tensors")


@dataclass(frozen=True)
class Expected:
    """The tensors of a Hugging Face checkpoint, as transformers saves and loads them.

    Attributes:
        shapes: The shape of each, None where it isn't known.
        tied: Names of another one's tensor.
        ignored: Patterns of names that transformers doesn't load.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    tied: frozenset[str]
    ignored: tuple[str, ...]

    def has_place(self, name: str) -> bool:
        """Return whether a tensor may be in the checkpoint."""
        return name in self.shapes or name in self.tied or any(re.search(each, name) for each in self.ignored)


def expected_tensors(config: Any) -> Expected | None:
    """Return the tensors that a config's model has, None for a model that transformers itself doesn't know.

    Args:
        config: The Hugging Face config. It is not changed.
    """
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    if kind is None or not names[0].endswith("ForCausalLM"):
        return None
    config = copy.deepcopy(config)
    if is_quantized(config):
        del config.quantization_config
    with torch.device("meta"):
        model = kind(config)
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:  # transformers 4
        tied = getattr(model, "_tied_weights_keys", None) or () if config.tie_word_embeddings else ()
    predicting = getattr(config, "num_nextn_predict_layers", None) or 0
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored += tuple(rf"\.layers\.{config.num_hidden_layers + each}\." for each in range(predicting))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has its models in the form of their checkpoints
        shapes = state
    else:
        shapes = revert_weight_conversion(model, state)
    return Expected({name: tuple(tensor.shape) for name, tensor in shapes.items()}, frozenset(tied), ignored)


def accounts_for_tensors(export: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `AutoBridge.export_ckpt`, which has a parameter `strict`: tensors are accounted for while it runs."""
    signature = inspect.signature(export)

    @functools.wraps(export)
    def accounting(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with exporting(bound.arguments["strict"]), _by_config_alone(bound.arguments["self"]):
            return export(*args, **kwargs)

    return accounting


def is_exported() -> bool:
    """Return whether a checkpoint is exported, and not a model that somebody trains."""
    return _strict.get() is not None


@contextmanager
def exporting(strict: bool) -> Iterator[None]:
    """Say that a checkpoint is exported, and whether a tensor that would be left out is an error."""
    token, found = _strict.set(strict), _found.set([])
    try:
        yield
    finally:
        _strict.reset(token)
        _found.reset(found)


@contextmanager
def _by_config_alone(bridge: "AutoBridge") -> Iterator[None]:
    """Let a bridge export without its source, which names what is converted, if the config has other tensors now."""
    pretrained: Any = bridge.hf_pretrained
    if not _has_other_tensors(bridge):
        yield
        return
    bridge.hf_pretrained = pretrained.config
    try:
        yield
    finally:
        bridge.hf_pretrained = pretrained


def _has_other_tensors(bridge: "AutoBridge") -> bool:
    """Return whether the source of a bridge has no weights, or its config has tensors now that it had not."""
    if _source_of_weights(bridge) is None:
        return False
    if not _names_of_source(bridge):
        return True
    if (before := trained_config.source_of(bridge)) is None:
        return False
    old, new = _expected_or_none(before), _expected_or_none(bridge.hf_pretrained.config)
    return old is not None and new is not None and not new.shapes.keys() <= old.shapes.keys()


def check_used(bridge: "MegatronModelBridge", chunks: Iterable[torch.nn.Module], tasks: Iterable[Any]) -> None:
    """Raise ValueError for parameters of which an export makes no tensor, while one rank exports."""
    if _strict.get() is None or ranks_hold_parts():
        return
    used = {task.param_name for task in tasks if task is not None and task.param_weight is not None}
    names = [bridge._unwrap_name(name) for chunk in chunks for name, _ in chunk.named_parameters()]
    if left := [name for name in names if name not in used and not bridge._is_adapter_param_name(name)]:
        _left_out(f"{type(bridge).__name__} exports no tensor for {some(left)}", _HINT)


def check_stored(state_dict: Mapping[str, Any], checkpoint_path: str | Path) -> None:
    """Compare the sharded state dict of a model with the tensors that a payload folder holds, before one is read.

    Raises:
        ValueError: The checkpoint lacks a tensor of the model or has it in another shape; or, while one rank exports
            it, it has a tensor that the model hasn't.
    """
    folder = Path(checkpoint_path)
    if not (folder / METADATA).is_file():
        return
    stored = {name: shape for name, (shape, _) in weights.weight_shapes(read_metadata(folder / METADATA)).items()}
    model = {each.key: each for each in _sharded(state_dict)}
    lacking = sorted(key for key in model if key not in stored)
    if lacking:
        raise ValueError(f"{folder} lacks {len(lacking)} tensors of the model, {some(lacking)}: {_HINT}")
    for key, tensor in model.items():
        found, wanted = stored[key], tuple(tensor.global_shape)
        if found != wanted and not (tensor.allow_shape_mismatch and found[1:] == wanted[1:]):
            raise ValueError(f"{folder} has {key} in the shape {list(found)}, the model in {list(wanted)}: {_HINT}")
    left = [
        name
        for name in sorted(stored.keys() - model.keys())
        if not _NO_WEIGHT.search(name) and not model.keys() & _twins(name)
    ]
    if left and not ranks_hold_parts() and _strict.get() is not None:
        _left_out(f"{folder} has {len(left)} tensors without a place in the model of config.json, {some(left)}", _HINT)


def ranks_hold_parts() -> bool:
    """Return whether each of several ranks holds a part of the model only."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    return max(sizes) > 1


def _twins(key: str) -> set[str]:
    """Return the keys under which the same norm may be stored, with and without Transformer Engine."""
    from megatron.bridge.host.layout import FUSED_NORMS

    pairs = [(own, fused) for own, fused, _ in FUSED_NORMS]
    return {key.replace(one, other) for pair in pairs for one, other in (pair, pair[::-1]) if one in key}


def _sharded(state_dict: Any) -> "Iterator[ShardedTensor]":
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(state_dict):
        if isinstance(entry, ShardedTensorFactory):
            yield from _sharded(entry.build())
        elif isinstance(entry, ShardedTensor):
            yield entry


def accounted(
    bridge: "AutoBridge", tensors: Iterable[tuple[str, torch.Tensor]], strict: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an export, and raise ValueError unless they are those of the Hugging Face model.

    A model that somebody trains is checked only if `strict`.
    """
    expected = None if not strict and _strict.get() is None else expected_of(bridge)
    # A tied head is a copy of the embedding, which comes only because the source has one of its own, or no weights.
    copies = trained_config.overrides(bridge).get("share_embeddings_and_output_weights")
    copies = copies or isinstance(bridge.hf_pretrained, transformers.PretrainedConfig)
    found = set()
    for name, tensor in tensors:
        if expected is not None and copies and name in expected.tied:
            continue
        if expected is not None:
            check_tensor(expected, name, tuple(tensor.shape))
        found.add(name)
        yield name, tensor
    if expected is not None:
        check_names(expected, found)


def check_tensor(expected: Expected, name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a tensor that the Hugging Face model has not, or has in another shape."""
    wanted = expected.shapes.get(name)
    if wanted is not None and shape != wanted:
        raise ValueError(f"{name} is {list(shape)} in the export, transformers expects {list(wanted)}: {_HINT}")
    if not expected.has_place(name) and not _SCALE.search(name):
        _left_out(f"transformers' model has no {name}, which the checkpoint has", _HINT)


def check_names(expected: Expected, names: Iterable[str]) -> None:
    """Raise ValueError for tensors that the Hugging Face model has and the export hasn't: they would be random."""
    if lacking := sorted(expected.shapes.keys() - set(names)):
        raise ValueError(f"the export lacks {len(lacking)} tensors of transformers' model, {some(lacking)}: {_HINT}")


def _left_out(what: str, remedy: str) -> None:
    if _strict.get() is not False:
        raise ValueError(f"{what}: {remedy}, or {_LENIENT}")
    logger.warning("%s: left out", what)


def expected_of(bridge: "AutoBridge") -> Expected | None:
    """Return the tensors that an export has; its source's where transformers has no model of it."""
    kept = _found.get([])
    if not kept:
        kept.append(_find_expected(bridge))
    return kept[0]


def _expected_or_none(config: Any) -> Expected | None:
    try:
        return expected_tensors(config)
    except _NO_MODEL as error:
        what = "transformers makes no model of config.json (%s): the export is compared with the tensors of its source"
        logger.warning(what, in_one_line(error))
        return None


def _find_expected(bridge: "AutoBridge") -> Expected | None:
    config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    found = _expected_or_none(config)
    names = [name for name in _names_of_source(bridge) if not _SCALE.search(name)]
    # transformers may load its model from other names than it has in memory; Bridge writes those of the source.
    renamed = found and names and not is_quantized(config) and not found.shapes.keys() <= set(names)
    found = None if renamed else found
    needed = [
        name for name in names if not accounting.NOT_NEEDED.search(name) and not accounting.PREDICTION.match(name)
    ]
    return found or (Expected(dict.fromkeys(needed), frozenset(names), ()) if names else None)


def is_quantized(config: Any) -> bool:
    """Return whether a config says that the stored weights are quantized, under names of their own."""
    return getattr(config, "quantization_config", None) is not None


def has_files_of_source(bridge: "AutoBridge") -> bool:
    """Return whether the files of the source have a place for each tensor of an export, which is divided alike."""
    expected = expected_of(bridge)
    return expected is None or expected.shapes.keys() <= set(_names_of_source(bridge))


def _source_of_weights(bridge: "AutoBridge") -> SafeTensorsStateSource | None:
    source = getattr(getattr(bridge.hf_pretrained, "state", None), "source", None)
    return source if isinstance(source, SafeTensorsStateSource) else None


def _names_of_source(bridge: "AutoBridge") -> list[str]:
    source = _source_of_weights(bridge)
    try:
        return list(source.get_all_keys()) if source is not None else []
    except FileNotFoundError:  # a folder of config and tokenizer
        return []
