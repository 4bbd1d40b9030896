# SPDX-License-Identifier: Apache-2.0
"""Routers whose weights are in float32, as the checkpoint has them, in a model of another dtype.

Megatron Core casts the weight of a router to the dtype of the model (core 0.19, transformer/moe/router.py), even if
`moe_router_dtype` says that it computes in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron.bridge.models.conversion.param_mapping import AutoMapping


__all__ = ["Float32Router", "with_float32_routers"]

P = ParamSpec("P")


class Float32Router(TopKRouter):
    """`TopKRouter` with its weight in float32."""

    def reset_parameters(self) -> None:
        """Initialize the weight as Megatron Core does, and keep it in float32 when the model is cast."""
        super().reset_parameters()
        self.weight.data = self.weight.data.float()
        self._keep_in_float32_parameter_names = ("weight",)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits, in float32, of a tensor of any dtype."""
        return super().gating(input.to(self.weight.dtype))


AutoMapping.register_module_type(Float32Router.__name__, "replicated")


def with_float32_routers(
    block_spec: Callable[P, TransformerBlockSubmodules],
) -> Callable[P, TransformerBlockSubmodules]:
    """Decorates a function that makes the spec of a block, for `Float32Router` in its layers of experts."""

    @functools.wraps(block_spec)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> TransformerBlockSubmodules:
        made: Any = block_spec(*args, **kwargs)
        for layer in made.layer_specs:
            experts = layer.submodules.mlp
            if getattr(experts, "func", None) is MoELayer:
                submodules = replace(experts.keywords["submodules"], router=Float32Router)
                layer.submodules.mlp = functools.partial(experts, submodules=submodules)
        return made

    return wrapper
