# SPDX-License-Identifier: Apache-2.0
"""Settings of a model that hold only on the host that converts it.

Megatron Core refuses to build some models where Transformer Engine, Apex or an accelerator is missing, though their
weights can be converted there. `adapt` sets such a model up for the host and remembers what it replaced; `as_recorded`
gives the settings back, so that a checkpoint says how the model trains, not where it was converted.
"""

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron.bridge.utils import accelerator, fusions


# What Megatron Core refuses, or its layers without Transformer Engine can't do, and the value that they can
# (core 0.19: transformer/transformer_config.py, TransformerConfig.__post_init__; transformer/torch_norm.py,
# WrappedTorchNorm; tensor_parallel/layers.py, ColumnParallelLinear.__init__).
_WITHOUT_TRANSFORMER_ENGINE = {
    "apply_rope_fusion": False,
    "cuda_graph_impl": "none",
    "delay_wgrad_compute": False,
    "fp4": None,
    "fp8": None,
    "fp8_param": False,
    "fused_residual_rmsnorm": False,
    "gradient_accumulation_fusion": False,
    # Decides what the norms compute, not what they hold.
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
# These make CUDA streams when the model is built (core 0.19, transformer/moe: shared_experts.py,
# SharedExpertMLP.__init__; token_dispatcher.py, MoEAlltoAllTokenDispatcher.__init__), and the all-gather dispatcher
# takes no variable lengths.
_WITHOUT_ACCELERATOR = {
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "overlap_moe_expert_parallel_comm": False,
    "use_cpu_initialization": True,
    "variable_seq_lengths": False,
}
# Makes buffers there that no checkpoint has (core 0.19, transformer/moe/router.py, TopKRouter.__init__).
_GLOBAL_AUX_LOSS = "global_aux_loss"
_REPLACED = "_replaced_on_this_host"


def adapt(config: Any) -> None:
    """Sets what this host lacks the means for to what it can do, and remembers the values that it replaces.

    Does nothing on a host that has Transformer Engine and an accelerator.

    Args:
        config: a model provider or transformer config, before Megatron Core's `__post_init__` checks it.
    """
    for name, value in _settings(config).items():
        if getattr(config, name, value) != value:
            _replaced(config)[name] = getattr(config, name)
            setattr(config, name, value)
    spec = getattr(config, "transformer_layer_spec", None)
    if not HAVE_TE and _uses_transformer_engine(spec, True):
        config.transformer_layer_spec = partial(spec, use_transformer_engine=False)


def as_recorded(config: Any) -> Any:
    """Returns `config` as a host with Transformer Engine and an accelerator would have it: what a checkpoint records.

    Args:
        config: a model provider, which is not changed.

    Returns:
        `config` itself where nothing differs, otherwise a shallow copy.
    """
    recorded = dict(vars(config).get(_REPLACED, {}))
    if not HAVE_TE:
        spec = getattr(config, "transformer_layer_spec", None)
        if _uses_transformer_engine(spec, False):
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
    """Returns the spec of a decoder layer from Megatron Core's own modules, for a host without Transformer Engine.

    Args:
        config: a `GPTModelProvider`, dense or mixture-of-experts, with or without multi-latent attention.
    """
    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )


def seed(value: int, **kwargs: Any) -> None:
    """Seeds the weights of a model that is built on this host.

    Megatron Core's generators live on the accelerator; without one it draws weights from PyTorch's own generator, the
    same full matrix on every tensor-parallel rank (core 0.19, tensor_parallel/layers.py,
    _initialize_affine_weight_cpu).

    Args:
        value: the seed.
        **kwargs: what `model_parallel_cuda_manual_seed` takes beside it.
    """
    if accelerator.is_available():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(value, **kwargs)
    else:
        torch.manual_seed(value)


def _settings(config: Any) -> dict[str, Any]:
    settings = {}
    if not HAVE_TE:
        settings |= _WITHOUT_TRANSFORMER_ENGINE
    if not accelerator.is_available():
        settings |= _WITHOUT_ACCELERATOR
        if getattr(config, "moe_router_load_balancing_type", None) == _GLOBAL_AUX_LOSS:
            settings["moe_router_load_balancing_type"] = "aux_loss"
    return settings


def _replaced(config: Any) -> dict[str, Any]:
    return vars(config).setdefault(_REPLACED, {})


def _uses_transformer_engine(spec: Any, value: bool) -> bool:
    return isinstance(spec, partial) and spec.keywords.get("use_transformer_engine") is value


def _fusion_was_detected(config: Any) -> bool:
    """Whether gradient accumulation fusion is off only because this host was asked what it can fuse."""
    if not dataclasses.is_dataclass(config) or getattr(config, "gradient_accumulation_fusion", True):
        return False
    defaults = {field.name: field.default_factory for field in dataclasses.fields(config)}
    return defaults.get("gradient_accumulation_fusion") is fusions.can_enable_gradient_accumulation_fusion
