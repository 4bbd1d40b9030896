# SPDX-License-Identifier: Apache-2.0
"""Accounts for an import: each tensor of the checkpoint goes somewhere, each parameter comes from somewhere.

The tasks of a bridge are the source of truth. Each is tried on tensors without values, and what it reads is noted.
"""

import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch

from megatron.bridge.models.conversion.hf_files import some
from megatron.bridge.models.conversion.quantized import FLOAT8, check_quantization
from megatron.bridge.models.conversion.stored_tensors import NOT_NEEDED, Reads, StoredTensors
from megatron.bridge.models.hf_pretrained.state import StateDict
from megatron.bridge.release_checkpoint import proof


if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask

logger = logging.getLogger(__name__)

# What no model needs that computes without quantization: the scales of activations and KV caches.
_SCALES = re.compile(
    r"\.(input_scale_(inv|ub)|((prob_)?output|input|activation|[qkv]|kv)_scale|kv_cache_scaling_factor)$"
)
# The causal mask of an attention, which older checkpoints hold as a buffer.
_MASK = re.compile(r"\.(attn|attention|self_attn)\.(bias|masked_bias)$")
# Values that Megatron's modules make: the load balance of a router, which is zero where a family has none, and the
# state of ModelOpt's quantizers.
CONSTRUCTED = re.compile(r"\.expert_bias$|_quantizer\._")
# A layer for multi-token prediction has a name of its own, or a number beyond the last layer, and these projections.
PREDICTION = re.compile(r"^(.*\bmtp(?:_\w+)?)\.|^(.*\blayers\.\d+)\.(?:eh_proj|enorm|hnorm)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def leave_out_prediction_layers(provider: Any, hf_pretrained: Any) -> None:
    """Take the layers for multi-token prediction from a model whose checkpoint has none, as transformers saves it.

    Args:
        provider: The provider of the model, which is changed.
        hf_pretrained: The checkpoint that is about to be loaded.
    """
    layers, state = getattr(provider, "mtp_num_layers", None), getattr(hf_pretrained, "state", None)
    if layers and isinstance(state, StateDict) and not any(map(PREDICTION.match, state.source.get_all_keys())):
        what = f"no weights for the prediction layers of its config ({layers})"
        proof.warn(logger, f"{_name(hf_pretrained)} has {what}. It is imported without them", left_out=what)
        provider.mtp_num_layers = None


def account(
    bridge: "MegatronModelBridge",
    hf_pretrained: Any,
    model: list[torch.nn.Module],
    tasks: Iterable["WeightConversionTask | None"],
    allowed: Iterable[str] | None = None,
) -> "Account | None":
    """Check the tasks of an import before a weight is read. Every rank comes to the same result.

    Args:
        bridge: The bridge that made the tasks.
        hf_pretrained: The checkpoint.
        model: The chunks of the model, unwrapped.
        tasks: The tasks.
        allowed: Patterns of parameters that a caller fills itself.

    Returns:
        What each task reads; None for a checkpoint whose tensors have no names.

    Raises:
        ValueError: A parameter has no source, a tensor has no place, or weights are quantized and would be read as if
            they were plain. Where a model is loaded and not imported, a tensor without a place is a warning, and so is
            a parameter without a source that the model initializes.
    """
    if not isinstance(getattr(hf_pretrained, "state", None), StateDict):
        return None
    result = Account(bridge, hf_pretrained, tasks)
    check_quantization(_name(hf_pretrained), hf_pretrained.config.to_dict(), result.stored)
    result.stored.check_index(getattr(hf_pretrained.config, "transformers_weights", None))
    result.check_scales()
    result.check_parameters(bridge, model, tuple(allowed or ()))
    result.check_tensors(model[0].config)
    proof.remember_account(result)
    return result


class Account:
    """What each task of an import reads of a checkpoint."""

    def __init__(
        self, bridge: "MegatronModelBridge", hf_pretrained: Any, tasks: Iterable["WeightConversionTask | None"]
    ) -> None:
        self.hf_pretrained = hf_pretrained
        self.stored = StoredTensors(hf_pretrained.state)
        self.tasks = [task for task in tasks if task is not None]
        self._bridge = bridge
        self._reads = Reads(bridge, self.stored)

    def reads(self, task: "WeightConversionTask") -> list[str]:
        """Return the tensors that a task reads."""
        return self._reads.of(task.mapping.hf_param)

    def values(self, name: str) -> torch.Tensor:
        """Return a tensor as the bridge reads it."""
        return self._bridge.maybe_modify_loaded_hf_weight(name, self.hf_pretrained.state)

    def check_scales(self) -> None:
        """Raise ValueError for FP8 weights that a task reads without their scales."""
        for task in self.tasks:
            names = self.reads(task)
            alone = [name for name in names if self.stored[name].dtype in FLOAT8]
            if alone and not any("scale" in name for name in names):
                raise ValueError(
                    f"{self.name} has FP8 weights whose scales are not read ({some(alone)}): import the original, "
                    "unquantized checkpoint"
                )

    def check_parameters(
        self, bridge: "MegatronModelBridge", model: list[torch.nn.Module], allowed: tuple[str, ...]
    ) -> None:
        """Raise ValueError for parameters of the model, on any rank, that no tensor is a source of."""
        tied = getattr(model[0].config, "share_embeddings_and_output_weights", False)
        sources = {task.global_param_name: str(task.mapping.hf_param) for task in self.tasks}
        lacking = [
            name
            for name in bridge._megatron_global_param_names_all_pp_ranks(model)
            if (name not in sources or sources[name] in self._reads.missing)
            and not (tied and "output_layer" in name)
            and not CONSTRUCTED.search(name)
            and not any(fnmatch(name, pattern) for pattern in allowed)
        ]
        if not lacking:
            return
        wanted = self._reads.missing.get(sources.get(min(lacking), ""))
        expected = f" (expected {wanted} in the checkpoint)" if wanted else ""
        message = (
            f"{self.name} has no source for {len(lacking)} parameters of the Megatron model, {some(lacking)}"
            f"{expected}: use weights and config of the same model. If they belong together, {type(bridge).__name__} "
            "doesn't support this variant"
        )
        if proof.is_strict() is not None or not getattr(model[0].config, "perform_initialization", True):
            raise ValueError(message)
        logger.warning("%s. They keep their initial values", message)

    def check_tensors(self, config: Any) -> None:
        """Raise ValueError, or warn, for tensors that a model needs and no task reads."""
        left = self._left(getattr(config, "expert_model_parallel_size", 1) or 1)
        found = filter(None, map(PREDICTION.match, self.stored))
        prefixes = tuple({f"{match[1] or match[2]}." for match in found})
        predicting = [name for name in left if name.startswith(prefixes)]
        if predicting:
            what = f"prediction layers are left out, {len(predicting)} tensors"
            proof.warn(logger, f"{self.name}: {what}", left_out=what)
        if scales := [name for name in left if _SCALES.search(name)]:
            proof.warn(logger, f"{self.name}: scales of activations or KV caches are left out, {len(scales)} tensors")
        tied = getattr(config, "share_embeddings_and_output_weights", False)
        heads = [name for name in left if tied and name.endswith("lm_head.weight")]
        if left := [name for name in left if name not in {*predicting, *scales, *heads}]:
            self._left_out(
                f"has {len(left)} tensors that the Megatron model has no place for, {some(left)}",
                "pass strict=False (--no-strict) to leave them out",
            )
        for name in heads:
            if not self._is_copy_of_embedding(name):
                self._left_out(
                    f"has a tied embedding and a {name!r} with other values",
                    "set tie_word_embeddings to false in config.json, because transformers doesn't tie them",
                )

    def _left_out(self, what: str, remedy: str) -> None:
        if proof.is_strict():
            raise ValueError(f"{self.name} {what}: {remedy}")
        proof.warn(logger, f"{self.name} {what}: left out", left_out=what)

    def _left(self, expert_parallel_size: int) -> list[str]:
        read = {name for task in self.tasks for name in self.reads(task)}
        # A rank has tasks for its own experts alone.
        numbered = expert_parallel_size > 1
        experts = {_EXPERT.sub(".experts.*.", name) for name in read} if numbered else set()
        return [
            name
            for name in self.stored
            if name not in read and _EXPERT.sub(".experts.*.", name) not in experts and self._is_needed(name)
        ]

    def _is_needed(self, name: str) -> bool:
        mask = _MASK.search(name) and self.stored[name].dim() not in (1, 2)
        return not mask and not NOT_NEEDED.search(name) and not self.stored.file(name).startswith("consolidated")

    def _is_copy_of_embedding(self, name: str) -> bool:
        read = (each for task in self.tasks for each in self.reads(task))
        embedding = next((each for each in read if each.endswith("embed_tokens.weight")), None)
        return embedding is not None and self.stored.equal(name, embedding)

    @property
    def name(self) -> str:  # noqa: D102
        return _name(self.hf_pretrained)


def _name(hf_pretrained: Any) -> str:
    return str(getattr(hf_pretrained, "model_name_or_path", None) or "the checkpoint")
