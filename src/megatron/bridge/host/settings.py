# SPDX-License-Identifier: Apache-2.0
"""Model settings that hold only on the host that converts the model.

Megatron Core refuses to build some models without Transformer Engine, Apex, or an accelerator, although their weights
can be converted. `adapt_to_host` changes such settings and remembers the old values. `as_recorded` restores them, so
that a checkpoint records how the model trains, and not where it was converted.
"""

import copy
import dataclasses
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron.bridge.host import accelerator
from megatron.bridge.utils import fusions


__all__ = ["adapt_to_host", "as_recorded", "local_layer_spec"]

# Megatron Core, or its layers without Transformer Engine, support only these values (core 0.19:
# transformer/transformer_config.py, TransformerConfig.__post_init__; transformer/torch_norm.py, WrappedTorchNorm;
# tensor_parallel/layers.py, ColumnParallelLinear.__init__).
_WITHOUT_TRANSFORMER_ENGINE = {
    "apply_rope_fusion": False,
    "cuda_graph_impl": "none",
    "delay_wgrad_compute": False,
    "fp4": None,
    "fp8": None,
    "fp8_param": False,
    "fused_residual_rmsnorm": False,
    "gradient_accumulation_fusion": False,
    # Changes what a norm computes, but not its weights.
    "layernorm_zero_centered_gamma": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "persist_layer_norm": False,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "use_te_activation_func": False,
    "use_te_rng_tracker": False,
    "use_transformer_engine_full_layer_spec": False,
    "use_transformer_engine_op_fuser": False,
}
# Other values create CUDA streams when the model is built (core 0.19, transformer/moe: shared_experts.py,
# SharedExpertMLP.__init__; token_dispatcher.py, MoEAlltoAllTokenDispatcher.__init__). The all-gather dispatcher
# doesn't support variable sequence lengths.
_WITHOUT_ACCELERATOR = {
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "overlap_moe_expert_parallel_comm": False,
    "use_cpu_initialization": True,
    "variable_seq_lengths": False,
}
# Creates CUDA buffers that no checkpoint has (core 0.19, transformer/moe/router.py, TopKRouter.__init__).
_GLOBAL_AUX_LOSS = "global_aux_loss"
_REPLACED = "_replaced_on_this_host"


def adapt_to_host(config: Any) -> None:
    """Replaces settings that this host doesn't support, and remembers the old values.

    Args:
        config: A model provider or transformer config, before Megatron Core's `__post_init__` validates it.
    """
    for name, value in _unsupported_settings(config).items():
        if getattr(config, name, value) != value:
            vars(config).setdefault(_REPLACED, {})[name] = getattr(config, name)
            setattr(config, name, value)
    spec = getattr(config, "transformer_layer_spec", None)
    if not HAVE_TE and _asks_for_transformer_engine(spec, True):
        config.transformer_layer_spec = partial(spec, use_transformer_engine=False)


def as_recorded(config: Any) -> Any:
    """Returns the settings that a host with Transformer Engine and an accelerator would have.

    Args:
        config: A model provider. It isn't changed.

    Returns:
        `config` itself if nothing was replaced, otherwise a shallow copy.
    """
    recorded = dict(vars(config).get(_REPLACED, {}))
    if not HAVE_TE:
        spec = getattr(config, "transformer_layer_spec", None)
        if _asks_for_transformer_engine(spec, False):
            recorded["transformer_layer_spec"] = partial(spec, use_transformer_engine=True)
        if _fusion_was_detected(config):
            recorded["gradient_accumulation_fusion"] = True
    if not recorded:
        return config
    result = copy.copy(config)
    for name, value in recorded.items():
        setattr(result, name, value)
    return result


def local_layer_spec(config: Any) -> ModuleSpec:
    """Returns the spec of a decoder layer that consists of Megatron Core's own modules.

    Args:
        config: A `GPTModelProvider`.
    """
    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )


def _unsupported_settings(config: Any) -> dict[str, Any]:
    settings = {}
    if not HAVE_TE:
        settings |= _WITHOUT_TRANSFORMER_ENGINE
    if not accelerator.is_available():
        settings |= _WITHOUT_ACCELERATOR
        if getattr(config, "moe_router_load_balancing_type", None) == _GLOBAL_AUX_LOSS:
            settings["moe_router_load_balancing_type"] = "aux_loss"
    return settings


def _asks_for_transformer_engine(spec: Any, value: bool) -> bool:
    return isinstance(spec, partial) and spec.keywords.get("use_transformer_engine") is value


def _fusion_was_detected(config: Any) -> bool:
    """Whether gradient accumulation fusion is off only because the default was computed on this host."""
    if not dataclasses.is_dataclass(config) or getattr(config, "gradient_accumulation_fusion", True):
        return False
    defaults = {field.name: field.default_factory for field in dataclasses.fields(config)}
    return defaults.get("gradient_accumulation_fusion") is fusions.can_enable_gradient_accumulation_fusion
