# SPDX-License-Identifier: Apache-2.0
"""A twin of a model: the same config with few layers, small widths and random weights, in which an error shows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


LAYERS = 16
"""A pattern that needs more layers is represented by one layer of each kind."""
_SHORT = 64  # a length that 512 tokens exceed
_HEADS = 4
_STEPS = ("full_attention_interval", "interleave_moe_layer_step", "moe_layer_freq", "sliding_window_pattern")
_NO_LAYERS = ("architectures", "eos_token_id", "mlp_only_layers")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def make_twin(source: str, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the twin of a Hugging Face model as a checkpoint of transformers.

    Args:
        source: The model. Only its config is read.
        folder: Where to write it.
        trust_remote_code: Whether the model's code may run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    small = type(config).from_dict(twin_values(config.to_dict()))
    torch.manual_seed(0)
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, **options)
    sharpen(model)
    model.save_pretrained(folder)


def why_no_twin(values: Mapping[str, Any]) -> str | None:
    """Return why no twin can be made of a config, None if one can."""
    if "num_hidden_layers" in values:
        return None
    parts = sorted(key for key, value in values.items() if key.endswith("_config") and isinstance(value, Mapping))
    if {"vision_config", "audio_config", "thinker_config"}.intersection(parts):
        return (
            f"no twin can be made of a model with a vision or audio tower (config.json has {', '.join(parts)}); a "
            "twin is a language model only"
        )
    return "no twin can be made: config.json has no num_hidden_layers"


def twin_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a twin's config.

    Kept are head sizes, RoPE, activations, switches and every other word; the kinds of layers, and which numbers are
    equal, one, or multiples of 128, are kept as classes. A window is shortened, and so is the length beyond which a
    scaling sets in, if it does so only in longer texts.
    """
    small = dict(values) | {"dtype": "float32"}
    small.pop("torch_dtype", None)
    small.pop("quantization_config", None)
    _layers(values, small)
    _widths(values, small)
    _experts(values, small)
    _lengths(values, small)
    small["vocab_size"] = 512 + values["vocab_size"] % 128
    for key, value in values.items():
        if key.endswith("_token_id") and value is not None:
            small[key] = min(value, 2) if isinstance(value, int) else [2]
    small["initializer_range"] = 0.8 / math.sqrt(small["hidden_size"])
    return small


def chosen_layers(kinds: Sequence[Any]) -> list[int]:
    """Choose layers: of what comes first one of each run, at least one period of the pattern, and the last kind."""
    count = len(kinds)
    lead, period = min(
        (
            (lead, period)
            for period in range(1, count + 1)
            for lead in range(count - period + 1)
            if all(kinds[i] == kinds[i + period] for i in range(lead, count - period))
        ),
        key=lambda found: (found[0] + found[1], found[1]),
    )
    chosen = [i for i in range(lead) if i == 0 or kinds[i] != kinds[i - 1]]
    # Ends at the place in the period at which the model ends.
    rest = next(n for n in range(period, count + period) if (count - lead - n) % period == 0)
    while len(chosen) + rest < 4 and lead + rest + period <= count:
        rest += period
    if len(chosen) + rest <= LAYERS:
        return chosen + list(range(lead, lead + rest))
    return sorted({kinds.index(kind) for kind in kinds} | {count - 1})


def _layers(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    count = values["num_hidden_layers"]
    lists = {
        key: value
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count and key not in _NO_LAYERS
    }
    steps = [value for key in _STEPS if isinstance(value := values.get(key), int) and value > 0]
    only, step = values.get("mlp_only_layers") or (), values.get("decoder_sparse_step") or 1
    dense, windowed = values.get("first_k_dense_replace") or 0, values.get("max_window_layers") or 0

    def kind(i: int) -> tuple[Any, ...]:
        sparse = i >= dense and i not in only and (i + 1) % step == 0
        return (sparse, i >= windowed, *(i % each for each in steps), *(repr(each[i]) for each in lists.values()))

    chosen = chosen_layers([kind(i) for i in range(count)])
    small["num_hidden_layers"] = len(chosen)
    small |= {key: [value[i] for i in chosen] for key, value in lists.items()}
    if "mlp_only_layers" in values:
        small["mlp_only_layers"] = [place for place, i in enumerate(chosen) if i in only]
    for key in ("first_k_dense_replace", "max_window_layers"):
        if values.get(key):
            small[key] = sum(i < values[key] for i in chosen)
    if values.get("num_nextn_predict_layers"):
        small["num_nextn_predict_layers"] = 0  # transformers doesn't compute them


def _widths(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    heads, groups = values["num_attention_heads"], values.get("num_key_value_heads")
    size = values.get("head_dim") or values["hidden_size"] // heads
    usual = size * heads == values["hidden_size"]
    small["num_attention_heads"] = min(heads, _HEADS)
    if groups:
        small["num_key_value_heads"] = small["num_attention_heads"] if groups == heads else min(groups, 2)
    if values.get("kv_lora_rank"):
        small["hidden_size"] = 256
    else:
        small["hidden_size"] = small["num_attention_heads"] * size // (1 if usual else 2)
    _reduce(values, small, [key for key in values if key.endswith("intermediate_size")], (384, 256, 128, 64))
    _reduce(values, small, ["q_lora_rank", "kv_lora_rank"], (96, 64))


def _reduce(values: Mapping[str, Any], small: dict[str, Any], keys: Sequence[str], sizes: Sequence[int]) -> None:
    """Give the largest value the first size, and so on. What was equal stays equal."""
    found = {key: value for key in keys if isinstance(value := values.get(key), int) and value > 0}
    sizes_of = dict(zip(sorted(set(found.values()), reverse=True), sizes, strict=False))
    small |= {key: min(value, sizes_of.get(value, sizes[-1])) for key, value in found.items()}


def _experts(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    for key in _EXPERTS:
        if values.get(key):
            small[key] = min(values[key], 8)
    each, groups = values.get("num_experts_per_tok"), values.get("n_group") or 1
    if not each:
        return
    small["num_experts_per_tok"] = min(each, 2)
    if groups > 1:
        # Groups are rated by their best experts, and how many these are is a quotient.
        whole = values["topk_group"] == groups
        small["n_group"], small["topk_group"] = 2, 2 if whole else 1
        small["num_experts_per_tok"] = min(4, max(1, each // values["topk_group"])) * small["topk_group"]


def _lengths(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    for key in ("sliding_window", "attention_chunk_size"):
        if isinstance(value := values.get(key), int):
            small[key] = min(value, _SHORT)
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if not isinstance(rope, dict) or (rope.get("rope_type") or rope.get("type")) not in ("dynamic", "longrope"):
            continue
        longest = values["max_position_embeddings"]
        original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        small["max_position_embeddings"] = _SHORT * (longest // original if original else 1)
        if rope.get("original_max_position_embeddings"):
            small[key] = {**rope, "original_max_position_embeddings": _SHORT}
        if values.get("original_max_position_embeddings"):
            small["original_max_position_embeddings"] = _SHORT


def sharpen(model: torch.nn.Module) -> None:
    """Make random weights tell: attention is peaked, so that a wrong position shows, and routers decide by a margin.

    With the usual initialisation even a wrong RoPE factor moves the logits by 0.3 %. Norms are moved from 1 and biases
    from 0. Values are those of bf16, which some families are converted to.
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.05)
            if name.endswith(_ATTENTION):
                tensor.mul_(2.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                tensor.mul_(1.5)
            if name.endswith(("mlp.gate.weight", "router.weight")):
                tensor.mul_(5)
            tensor.copy_(tensor.bfloat16())


_ATTENTION = tuple(
    f"{name}.weight"
    for name in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
)
