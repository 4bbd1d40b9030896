# SPDX-License-Identifier: Apache-2.0
"""RoPE and sliding windows of config.json in Megatron Core's terms: what is carried over, and how both compare."""

import importlib
import inspect
import math
from typing import Any

import torch
import transformers


# Families of GPTModelProvider whose layers have one RoPE for all.
FAMILIES = (
    "exaone4", "exaone_moe", "gemma", "gemma2", "glm4_moe", "gpt_oss", "hy_v3", "llama", "minimax_m2", "ministral",
    "mistral", "nemotron", "olmoe", "qwen2", "qwen3", "qwen3_moe", "qwen3_next",
)  # fmt: skip
# Where transformers has sliding windows: in the layers that `layer_types` names, or in all. Other families have none,
# whatever their config says.
WINDOWS_BY_LAYER = (
    "exaone4", "exaone_moe", "gemma2", "gemma3_text", "gpt_oss", "ministral", "qwen2", "qwen3",
)  # fmt: skip
# Families whose windows have a size even where no layer uses it (transformers makes their mask in any case).
_WINDOWS_ALWAYS = ("gemma2", "gemma3_text", "gpt_oss")
_WINDOWS_IN_ALL = ("mistral", "qwen3_moe")


def own_config(config: Any) -> Any:
    """Return the config in transformers' class of its model type, where code of a checkpoint has brought another."""
    kinds = transformers.CONFIG_MAPPING
    kind = kinds[config.model_type] if config.model_type in kinds else type(config)
    return config if isinstance(config, kind) else kind.from_dict(config.to_dict())


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return the RoPE parameters of a config, in whichever of the two spellings its transformers has."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = found.get("rope_type") or found.get("type") or "default"
    original = getattr(config, "original_max_position_embeddings", None)
    if original and kind in ("llama3", "yarn", "longrope") and hasattr(config, "rope_parameters"):
        # It goes first (`RotaryEmbeddingConfigMixin.standardize_rope_params` of transformers 5).
        found = {**found, "original_max_position_embeddings": original}
    return {"rope_theta": getattr(config, "rope_theta", None), **found, "rope_type": kind}


def windows(config: Any) -> list[int | None]:
    """Return the sliding window of each layer in transformers' model, None for a layer without one."""
    window = getattr(config, "sliding_window", None)
    if config.model_type in WINDOWS_BY_LAYER:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if config.model_type in _WINDOWS_IN_ALL else None] * config.num_hidden_layers


def check_windows(source: Any) -> None:
    """Refuse sliding windows without a size, which some bridges read as a number.

    Args:
        source: The Hugging Face model, or its config.

    Raises:
        ValueError: There is no size.
    """
    config = getattr(source, "config", source)
    kind, window = getattr(config, "model_type", None), getattr(config, "sliding_window", 1)
    if kind in _WINDOWS_ALWAYS and not window:
        raise ValueError(
            f"config.json of {kind}: sliding_window is {window!r}, expected a number, because {kind} always has "
            "sliding windows: take config.json from the model's publisher"
        )


def carry_over(provider: Any, source: Any) -> None:
    """Give a provider the RoPE scaling and the sliding windows of the config that it was made from.

    Args:
        provider: What a bridge's `provider_bridge` has returned. Of other families than `FAMILIES`, only Gemma 3's
            pattern of windows is changed.
        source: The Hugging Face model, or its config.
    """
    config = getattr(source, "config", source)
    if config.model_type in ("gemma3", "gemma3_text"):
        kinds = getattr(config, "text_config", config).layer_types
        local = kinds.index("full_attention") if "full_attention" in kinds else len(kinds)
        provider.interleaved_attn_pattern = (local, 1)
    if config.model_type not in FAMILIES:
        return
    config = own_config(config)
    _carry_windows(provider, config)
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    provider.position_embedding_type = "yarn" if kind == "yarn" else "rope"
    provider.rope_scaling = kind == "llama3"
    provider.seq_len_interpolation_factor = rope["factor"] if kind == "linear" else None
    if kind == "llama3":
        provider.rope_scaling_factor = rope["factor"]
    frequencies, attention = transformers_rope(config)
    dimensions = provider.kv_channels or config.hidden_size // config.num_attention_heads
    provider.rotary_percent = 2 * len(frequencies) / dimensions
    if kind != "yarn":
        return
    length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    provider.yarn_rotary_scaling_factor = rope.get("factor") or config.max_position_embeddings / length
    provider.yarn_original_max_position_embeddings = length
    provider.yarn_beta_fast = rope.get("beta_fast") or 32.0
    provider.yarn_beta_slow = rope.get("beta_slow") or 1.0
    provider.yarn_correction_range_round_to_int = bool(rope.get("truncate", True))
    # Megatron Core multiplies by 0.1 mscale log(factor) + 1, divided by the same with mscale_all_dim.
    growth = 0.1 * math.log(max(provider.yarn_rotary_scaling_factor, 1.0))
    usual = not growth or math.isclose(attention, growth + 1)
    provider.yarn_mscale, provider.yarn_mscale_all_dim = (None, None) if usual else ((attention - 1) / growth, 0.0)


def _carry_windows(provider: Any, config: Any) -> None:
    wanted = windows(config)
    if megatron_windows(provider) == wanted:
        return
    size = max((each for each in wanted if each), default=None)
    provider.window_size = size and (size - 1, 0)
    pattern = [int(each is not None) for each in wanted]
    provider.window_attn_skip_freq = None if all(pattern) or not size else pattern


def megatron_windows(provider: Any) -> list[int | None]:
    """Return the sliding window of each layer of a provider's model, None for a layer without one."""
    from megatron.core.transformer.utils import is_layer_window_attention

    size, skipped = provider.window_size, getattr(provider, "window_attn_skip_freq", None)
    layers = range(1, provider.num_layers + 1)
    if pattern := getattr(provider, "interleaved_attn_pattern", None):
        # Gemma 3 (gemma3_provider.py of Bridge 0.6, `_is_local_attn_layer`).
        return [size if layer % sum(pattern) else None for layer in layers]
    if hasattr(provider, "query_pre_attn_scalar"):
        # Gemma 2 (gemma2_provider.py of Bridge 0.6, `Gemma2DotProductAttention`).
        return [size[0] + 1 if layer % 2 else None for layer in layers]
    return [size[0] + 1 if is_layer_window_attention(size, skipped, layer) else None for layer in layers]


def transformers_rope(config: Any) -> tuple[torch.Tensor, float]:
    """Return the rotary frequencies of transformers' model, and the factor of its sines and cosines."""
    modeling = modeling_of(config)
    names = [
        name for name, each in vars(modeling).items() if name.endswith("RotaryEmbedding") and inspect.isclass(each)
    ]
    embedding = getattr(modeling, names[0])(config=config)
    return embedding.inv_freq.float(), float(embedding.attention_scaling)


def modeling_of(config: Any) -> Any:
    """Return the module of transformers that makes the model of a config."""
    return importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))


def megatron_rope(provider: Any) -> tuple[torch.Tensor, float]:
    """Return the same of Megatron Core's model (`RotaryEmbedding` and `YarnRotaryEmbedding`, core 0.19)."""
    latent = getattr(provider, "multi_latent_attention", False)
    dimensions = provider.qk_pos_emb_head_dim if latent else provider.kv_channels
    dimensions = dimensions or provider.hidden_size // provider.num_attention_heads
    if latent and provider.rope_type == "yarn":
        return _yarn(dimensions, provider.rotary_base, **{name: getattr(provider, name) for name in _LATENT_YARN})
    if not latent and provider.position_embedding_type == "yarn":
        fields = {name: getattr(provider, f"yarn_{name}") for name in _LATENT_YARN}
        rounded = provider.yarn_correction_range_round_to_int
        return _yarn(dimensions, provider.rotary_base, **fields, rounded=rounded)
    if provider.rotary_percent < 1:
        dimensions = int(dimensions * provider.rotary_percent)
    frequencies = _plain(dimensions, provider.rotary_base)
    if getattr(provider, "rope_scaling", False) and not latent:
        # Megatron Core has one original length and one pair of factors.
        known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaling = {"rope_type": "llama3", "factor": provider.rope_scaling_factor, **known}
        return _by_transformers(dimensions, provider.rotary_base, scaling), 1.0
    return frequencies / (getattr(provider, "seq_len_interpolation_factor", None) or 1.0), 1.0


_LATENT_YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def _plain(dimensions: int, base: float) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions))


def _yarn(
    dimensions: int,
    base: float,
    rotary_scaling_factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    mscale: float | None,
    mscale_all_dim: float | None,
    rounded: bool = True,
) -> tuple[torch.Tensor, float]:
    scaling = {
        "rope_type": "yarn",
        "factor": rotary_scaling_factor,
        "original_max_position_embeddings": original_max_position_embeddings,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": rounded,
    }

    def concentration(scale: float) -> float:
        return 0.1 * scale * math.log(max(rotary_scaling_factor, 1.0)) + 1.0

    attention = concentration(1.0)
    if mscale is not None and mscale_all_dim is not None:
        attention = concentration(mscale) / concentration(mscale_all_dim)
    return _by_transformers(dimensions, base, scaling), attention


def _by_transformers(dimensions: int, base: float, scaling: dict[str, Any]) -> torch.Tensor:
    """Compute frequencies by transformers' formula, which is Megatron Core's, from Megatron Core's parameters."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": base, **scaling}
    new = hasattr(transformers.LlamaConfig(), "rope_parameters")
    spelled = {"rope_parameters": rope} if new else {"rope_theta": base, "rope_scaling": scaling}
    config = transformers.LlamaConfig(
        hidden_size=dimensions, num_attention_heads=1, head_dim=dimensions, max_position_embeddings=1 << 30, **spelled
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")[0].float()
