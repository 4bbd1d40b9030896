# SPDX-License-Identifier: Apache-2.0
"""Latent attention whose query isn't compressed, as in DeepSeek-V2-Lite: `q_lora_rank` is None.

Such a model has a norm for the compressed keys and values, and none for the query. Megatron Core 0.19 has one setting,
`qk_layernorm`, for both: with it, it puts a norm in front of the query, which no published model has, and refuses
Megatron Core's own layers (transformer/mla_qk_norm_config.py). Earlier versions built what is built here.
"""

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules


if TYPE_CHECKING:
    from megatron.bridge.models.gpt_provider import GPTModelProvider


__all__ = ["PlainQueryAttention", "with_plain_query"]

Spec = TypeVar("Spec")


class PlainQueryAttention(MLASelfAttention):
    """`MLASelfAttention` without a norm in front of the query."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        # With a compressed query, Megatron Core leaves the plain projection as it is.
        compressed = copy.copy(self.config)
        compressed.q_lora_rank = 1
        resolved = multi_latent_attention.QKNormConfigResolver(compressed, submodules).resolve()
        return resolved | {"linear_q_proj": submodules.linear_q_proj}


def with_plain_query(spec: Spec, config: "GPTModelProvider") -> Spec:
    """Return the spec of a layer or a block, with `PlainQueryAttention` where its query isn't compressed.

    Args:
        spec: A spec of this model alone, which is changed.
        config: The provider of the model.
    """
    latent = getattr(config, "multi_latent_attention", False) and getattr(config, "q_lora_rank", 0) is None
    if latent and hasattr(multi_latent_attention, "QKNormConfigResolver"):
        for layer in getattr(spec, "layer_specs", None) or [spec]:
            attention = getattr(layer.submodules, "self_attention", None)
            if attention is not None and getattr(attention, "module", None) is MLASelfAttention:
                attention.module = PlainQueryAttention
    return spec
