# SPDX-License-Identifier: Apache-2.0
"""Which keys of config.json say a fact of Megatron-LM's args, and how a config is given another value."""

from collections.abc import Iterator
from typing import Any


# The first key that a config has is written. `trained_config.py` checks that its model then has the value.
_KEYS = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "layernorm_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "tied": ("tie_word_embeddings",),
    "add_qkv_bias": ("attention_bias", "qkv_bias"),
    "add_bias_linear": ("mlp_bias", "use_bias"),
    "qk_layernorm": ("use_qk_norm",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"),
    "moe_router_topk": ("num_experts_per_tok",),
    "moe_router_topk_scaling_factor": ("routed_scaling_factor", "router_scaling_factor"),
    "moe_router_num_groups": ("n_group",),
    "moe_router_group_topk": ("topk_group",),
    "moe_router_score_function": ("scoring_func",),
    "moe_shared_expert_intermediate_size": ("shared_expert_intermediate_size",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "mtp_num_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
}
# Llama 3's scaling, of which Megatron Core knows one (RotaryEmbedding._apply_scaling, core 0.19).
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KINDS = ("default", "linear", "llama3", "yarn")
_OWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def write(config: Any, name: str, trained: dict[str, Any]) -> None:
    """Give a config the value of a fact, where it has a key for it.

    Args:
        config: The config of the language model, which is changed.
        name: The fact.
        trained: All facts of the checkpoint.
    """
    value = trained[name]
    if name == "rope":
        _write_rope(config, value)
    elif name == "windows":
        _write_windows(config, value)
    elif name == "sparse":
        _write_sparse(config, value)
    elif name == "moe_shared_expert_intermediate_size" and hasattr(config, "n_shared_experts"):
        config.n_shared_experts = (value or 0) // trained["moe_ffn_hidden_size"]
    elif name == "moe_router_pre_softmax" and hasattr(config, "norm_topk_prob"):
        config.norm_topk_prob = not value
    else:
        key = next((key for key in _KEYS.get(name, ()) if hasattr(config, key) or key == "head_dim"), None)
        # No family with experts has a model without.
        if key is not None and (name, value) != ("num_experts", None):
            setattr(config, key, value)
        if name == "num_attention_heads" and trained.get("multi_latent_attention"):
            config.num_key_value_heads = value  # latent attention has no groups
        if key in ("qk_nope_head_dim", "qk_rope_head_dim") and hasattr(config, "qk_head_dim"):
            config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
            config.head_dim = config.qk_rope_head_dim


def _write_rope(config: Any, rope: dict[str, Any]) -> None:
    found: Any = getattr(config, "rope_parameters", None)
    new = isinstance(found, dict)
    old = dict(found if new else getattr(config, "rope_scaling", None) or {})
    kind = rope["rope_type"]
    if (
        kind not in _KINDS
        or any(isinstance(each, dict) for each in old.values())
        or isinstance(rope["rope_theta"], list)
    ):
        return  # transformers has none of this kind, or one for each kind of layers, which args can't say
    same = (old.get("rope_type") or old.get("type") or "default") == kind
    scaling = {name: value for name, value in rope.items() if name not in ("rotary_percent", "no_rope_freq")}
    # Megatron-LM's flags take whole numbers, transformers' own are floats.
    scaling |= {name: float(scaling[name]) for name in ("rope_theta", "factor") if name in scaling}
    if kind == "llama3":
        scaling |= _LLAMA_3
    # Other spellings of what is written here must not contradict it.
    dropped = () if "mscale" in rope else ("mscale", "mscale_all_dim")
    kept = {name: value for name, value in old.items() if (same or name in _OWN) and name not in dropped}
    if kept.get("partial_rotary_factor", 1.0) != rope["rotary_percent"]:
        kept["partial_rotary_factor"] = rope["rotary_percent"]
    parameters = kept | scaling
    parameters.pop("type", None)
    if new:
        for name in parameters.keys() & vars(config).keys():  # the original length, which goes first there
            setattr(config, name, parameters[name])
        config.rope_parameters = parameters
        return
    config.rope_theta = parameters.pop("rope_theta")
    parameters.pop("partial_rotary_factor", None)
    if getattr(config, "partial_rotary_factor", 1.0) != rope["rotary_percent"]:
        config.partial_rotary_factor = rope["rotary_percent"]
    config.rope_scaling = None if kind == "default" else parameters


def _write_windows(config: Any, windows: list[Any]) -> None:
    if any(isinstance(each, (list, tuple)) for each in windows):
        return  # transformers has no window of later tokens
    size = max((each for each in windows if each), default=None)
    if hasattr(config, "sliding_window"):
        config.sliding_window = size
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = size is not None
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = ["sliding_attention" if each else "full_attention" for each in windows]


def _write_sparse(config: Any, sparse: list[bool]) -> None:
    dense = [layer for layer, has_experts in enumerate(sparse) if not has_experts]
    if isinstance(getattr(config, "mlp_layer_types", None), list):
        config.mlp_layer_types = ["sparse" if each else "dense" for each in sparse]
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = len(dense)


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Give what has changed in a config, a few words for each key."""
    for key in sorted({*old, *new} - {"dtype", "torch_dtype"}):
        if old.get(key) != new.get(key):
            yield f"{key} is {new.get(key)!r}, was {old.get(key)!r}"


def other_function(config: Any, provider: Any, before: Any, original: dict[str, Any]) -> list[str]:
    """Return how transformers' and Bridge's readings of a changed config differ, if the family's keys are known.

    Args:
        config: The config of the language model.
        provider: Bridge's model of it.
        before: Bridge's model of the config before it was changed. What was wrong then is left out.
        original: That config.
    """
    from megatron.bridge.models.conversion import rope_scaling
    from megatron.bridge.models.conversion.config_check import FAMILIES, problems

    if config.model_type not in FAMILIES:
        return []
    keys = FAMILIES[config.model_type]
    old = set(problems(rope_scaling.own_config(type(config).from_dict(dict(original))), before, keys))
    return [each for each in problems(rope_scaling.own_config(config), provider, keys) if each not in old]
