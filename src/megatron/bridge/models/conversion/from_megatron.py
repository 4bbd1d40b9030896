# SPDX-License-Identifier: Apache-2.0
"""Makes a release checkpoint of what Megatron-LM has saved, in any of its formats that are read, without Hugging Face.

The model is Bridge's, made without weights from the checkpoint's args. Its parameters are pieces of the checkpoint's
files (load.py), and it is saved as an import saves its model.
"""

import os
from argparse import Namespace
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch.nn import functional

from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.streaming.load import stored_weights
from megatron.bridge.models.conversion.streaming.model import meta_model, replace_weights
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.mla_provider import MLAModelProvider
from megatron.bridge.release_checkpoint.architecture import UNSAID, differ, facts
from megatron.bridge.release_checkpoint.args import NEVER_READ, READ, megatron_lm_args
from megatron.bridge.release_checkpoint.layout import resolve_checkpoint
from megatron.bridge.release_checkpoint.payload import examine_payload, refuse_damage
from megatron.bridge.training.mlm_compat.activations import squared_relu
from megatron.bridge.training.model_load_save import save_megatron_model
from megatron.bridge.training.release_writer import check_release_target


_SCALING = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
_HYBRID = ("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern", "hybrid_attention_ratio")


def import_megatron_lm(source: str | os.PathLike, out: str | os.PathLike, link_iter_0: bool = False) -> None:
    """Write the model of a checkpoint of Megatron-LM as a release checkpoint, tensor by tensor.

    The weights keep their dtype, and under torchrun the ranks divide them. Optimizer, schedule, and random state are
    left behind.

    Args:
        source: Checkpoint root or payload folder, in the format `torch`, `torch_dcp`, or `torch_dist`.
        out: Root of the release checkpoint.
        link_iter_0: Whether to leave a link `iter_0000000` to it.

    Raises:
        ValueError: The checkpoint is damaged, its format isn't read, or its args say a model that Bridge can't make.
    """
    check_release_target(out)
    payload = resolve_checkpoint(source)
    provider = provider_of(payload)
    with accelerator.gloo_group():
        accelerator.seed(0)
        model: Any = meta_model(provider)
        (chunk,) = unwrap_model(model)
        values = stored_weights(payload, chunk)
        parameters = chunk.state_dict(keep_vars=True)
        if missing := [name for name, _ in chunk.named_parameters() if name not in values]:
            raise ValueError(f"{payload} lacks {missing[0]}, which the model of its args has: save it again")
        replace_weights([chunk], {parameters[name]: value for name, value in values.items()})
        save_megatron_model(model, os.fspath(out), release=True, link_iter_0=link_iter_0)


def provider_of(payload: str | os.PathLike) -> GPTModelProvider:
    """Return Bridge's description of the model whose args a payload has. It has the same facts (architecture.py).

    Raises:
        ValueError: There are no args, or they say what this description can't.
    """
    found = examine_payload(Path(payload))
    refuse_damage(found)
    if found.args is None:
        raise ValueError(f"{payload} has no args of Megatron-LM: import the Hugging Face model that it was made from")
    args = found.args
    if found.contradictions:
        raise ValueError(f"{payload} has the args of another model ({found.contradictions[0]}): save it again")
    if hybrid := next((name for name in _HYBRID if getattr(args, name, None)), None):
        raise ValueError(f"{payload} is a hybrid model ({hybrid}), expected a GPT: export it, and import the export")
    provider = _provider(args, found.dtypes)
    provider.finalize()
    made = facts(megatron_lm_args(provider))
    for name, value in facts(args).items():
        if differ(value, made.get(name, UNSAID.get(name))):
            what = f"{payload} has {name} {value}, and a release checkpoint of it would have {made.get(name)}"
            raise ValueError(f"{what}: export it, and import the export")
    return provider


def _provider(args: Namespace, dtypes: list[str]) -> GPTModelProvider:
    latent = bool(getattr(args, "multi_latent_attention", False))
    kind: Any = MLAModelProvider if latent else GPTModelProvider
    own: Any = [(arg.value or arg.name, arg.name) for arg in (*READ, *NEVER_READ) if _is_field(arg)]
    values = {field: getattr(args, name, None) for field, name in own}
    for old, new in (("norm_epsilon", "layernorm_epsilon"), ("apply_layernorm_1p", "layernorm_zero_centered_gamma")):
        if values.get(new) is None:
            values[new] = getattr(args, old, None)
    yarn = "" if latent else "yarn_"
    dtype = next((name for name in dtypes if name in ("bfloat16", "float16")), "float32")
    values |= {
        "num_query_groups": args.num_query_groups if getattr(args, "group_query_attention", False) else None,
        "vocab_size": args.padded_vocab_size,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "num_moe_experts": getattr(args, "num_experts", None),
        "moe_ffn_hidden_size": getattr(args, "moe_ffn_hidden_size", None),
        "mtp_num_layers": getattr(args, "mtp_num_layers", None),
        "rotary_base": getattr(args, "rotary_base", None),
        "seq_len_interpolation_factor": getattr(args, "rotary_seq_len_interpolation_factor", None),
        "rope_scaling": getattr(args, "use_rope_scaling", None),
        **{f"{yarn}{name}": getattr(args, name, None) for name in _SCALING},
        **_activation(args),
    }
    known = {each.name for each in fields(kind)}
    provider = kind(**{name: value for name, value in values.items() if name in known and value is not None})
    if provider.num_moe_experts:
        # Some layers may be dense.
        provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=HAVE_TE)
    provider.params_dtype = provider.pipeline_dtype = getattr(torch, dtype)
    provider.bf16, provider.fp16 = dtype == "bfloat16", dtype == "float16"
    return provider


def _is_field(arg: Any) -> bool:
    """Return whether an arg is a field of the model's description as it is."""
    return not callable(arg.value) and arg.name not in ("bf16", "fp16")


def _activation(args: Namespace) -> dict[str, Any]:
    """Return the activation, as Megatron-LM chooses it (core_transformer_config_from_args of core 0.19)."""
    if getattr(args, "swiglu", False):
        return {"activation_func": functional.silu, "gated_linear_unit": True}
    if getattr(args, "quick_geglu", False):
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        return {"activation_func": quick_gelu, "gated_linear_unit": True}
    return {"activation_func": squared_relu} if getattr(args, "squared_relu", False) else {}
