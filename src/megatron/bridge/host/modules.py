# SPDX-License-Identifier: Apache-2.0
"""Lets Megatron Core build modules that it ties to CUDA or Transformer Engine.

Core 0.19 places four things on the current CUDA device:

- the expert bias of a mixture-of-experts router: transformer/moe/router.py, TopKRouter.__init__
- the rotary embedding of multi-latent attention: transformer/multi_latent_attention.py, MultiLatentAttention.__init__
- the cache of YaRN's embedding: models/common/embeddings/yarn_rotary_pos_embedding.py, YarnRotaryEmbedding.__init__
- an embedding that pipeline stages share: models/common/language_module/language_module.py,
  LanguageModule.setup_embeddings_and_output_layer

Multi-latent attention also passes arguments that only Transformer Engine's attention accepts
(transformer/dot_product_attention.py, DotProductAttention.__init__). Megatron-LM's pull request 6270 changes Core; a
Core with that change doesn't need this module.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.host import accelerator


__all__ = ["building_on_this_host"]


@contextmanager
def building_on_this_host() -> Iterator[None]:
    """Changes Megatron Core so that a model can be built on this host, and restores it afterwards."""
    with ExitStack() as stack:

        def substitute(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(_substituted(owner, name, new))

        if not accelerator.is_available():
            substitute(TopKRouter, "__init__", _with_expert_bias_on_cpu(TopKRouter.__init__))
            substitute(LanguageModule, "setup_embeddings_and_output_layer", _setup_shared_embedding_on_cpu)
            substitute(YarnRotaryEmbedding, "_set_cos_sin_cache", _leave_cache_empty)
            for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
                substitute(multi_latent_attention, embedding.__name__, partial(embedding, use_cpu_initialization=True))
        if not HAVE_TE:
            # Core sets NVTE_* variables for the model's attention, and refuses a later model that needs other values.
            stack.callback(_restore_environment, dict(os.environ))
            substitute(DotProductAttention, "__init__", _without_device(DotProductAttention.__init__))
        yield


@contextmanager
def _substituted(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replaces an attribute of a class or module inside the context."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _with_expert_bias_on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    """Returns a `TopKRouter.__init__` that creates the expert bias, float32 of shape [num_moe_experts], on the CPU."""

    @wraps(init)
    def wrapper(self: TopKRouter, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        without_bias = copy.copy(config)
        without_bias.moe_router_enable_expert_bias = False
        init(self, without_bias, *args, **kwargs)
        self.config = config
        if config.moe_router_enable_expert_bias:
            self.enable_expert_bias = True
            for name, persistent in (("local_tokens_per_expert", False), ("expert_bias", True)):
                delattr(self, name)
                self.register_buffer(name, torch.zeros(config.num_moe_experts), persistent=persistent)

    return wrapper


def _leave_cache_empty(self: YarnRotaryEmbedding, seq_len: int, offset: int, dtype: torch.dtype) -> None:
    """Marks the cache as empty, so that the first read fills it."""
    self.max_seq_len_cached = 0


def _setup_shared_embedding_on_cpu(
    self: LanguageModule, setup: Callable[[LanguageModule], None] = LanguageModule.setup_embeddings_and_output_layer
) -> None:
    """Does what Megatron Core does, but reduces the embedding of the first and last stage on the CPU."""
    with _substituted(LanguageModule, "_is_in_embd_group", lambda self: False):
        setup(self)
    is_shared = self.share_embeddings_and_output_weights or getattr(self.config, "mtp_num_layers", 0)
    if (
        is_shared
        and dist.is_initialized()
        and self.config.pipeline_model_parallel_size > 1
        and not self.config.init_model_with_meta_device
        and self._is_in_embd_group()
    ):
        dist.all_reduce(self.shared_embedding_or_output_weight().data, group=self.embd_group)


def _without_device(init: Callable[..., None]) -> Callable[..., None]:
    """Returns a `DotProductAttention.__init__` that creates the softmax offset, one value per head, on the CPU.

    It also accepts the head sizes that multi-latent attention passes. No weight depends on them.
    """

    @wraps(init)
    def wrapper(
        self: DotProductAttention,
        config: TransformerConfig,
        *args: Any,
        k_channels=None,
        v_channels=None,
        **kwargs: Any,
    ) -> None:
        vanilla = copy.copy(config)
        vanilla.softmax_type = "vanilla"
        init(self, vanilla, *args, **kwargs)
        self.config = config
        if config.softmax_type != "vanilla":
            offset = torch.zeros(self.num_attention_heads_per_partition, dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(offset) if config.softmax_type == "learnable" else offset

    return wrapper
