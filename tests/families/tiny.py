# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every architecture that Bridge registers, as transformers saves them.

A row of `ROWS` is an architecture. Its config is the default of its class in transformers, with small sizes.
"""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizer import train_tokenizer
from transformers import AutoConfig

from megatron import bridge


_TEXT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "first_k_dense_replace": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "embed_dim": 32,
    "image_size": 56,
    "out_hidden_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "output_dim": 64,
}
# Published in float32, whatever the dtype of the weights.
_IN_FLOAT32 = ("e_score_correction_bias", "expert_bias")
# Follow from others.
_DERIVED = ("layer_types", "mlp_layer_types", "architectures", "model_type", "dtype")


@dataclass(frozen=True)
class Row:
    """An architecture.

    Attributes:
        values: What differs from the small default. Values of nested configs are dicts.
        written: config.json of a model whose code is on the hub. The tensors are then those that Bridge maps.
        model: The class of the model, in transformers or, with its module, in Bridge. Default: the class in
            transformers that has the architecture's name.
        published: Values of config.json that transformers doesn't save.
        in_float32: Ends of names of tensors that are published in float32, besides `_IN_FLOAT32`.
        reason: Part of the first line of what doesn't come back, or of the error. None if all comes back.
    """

    values: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    in_float32: tuple[str, ...] = ()
    reason: str | None = None


_TIED = {"tie_word_embeddings": True}
_LATENT = {"head_dim": 16, "qk_head_dim": 32, "num_key_value_heads": 4, "num_experts_per_tok": 2}

_GEMMA_4 = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16, "global_head_dim": 32}
_GEMMA_4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_MINISTRAL = _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
_MINIMAX_M3 = {
    "projector_hidden_size": 64,
    "merged_hidden_size": 256,
    "text_config": {
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    },
}

# What models of the hub have in config.json.
_WRITTEN = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_WRITTEN_EXPERTS = _WRITTEN | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_WRITTEN_LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_STEP = {
    "num_attention_groups": 2,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "share_expert_dims": 32,
    "share_expert_dim": 32,
    "moe_layers_enum": [1, 2, 3],
    "num_nextn_predict_layers": 0,
    "use_qk_norm": True,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 8,
        "num_attention_groups": 2,
        "head_dim": 16,
    },
    "sliding_window": 32,
    "max_seq_len": 256,
}

ROWS: dict[str, Row] = {
    "BailingMoeV2ForCausalLM": Row(model="megatron.bridge.models.bailing.modeling_bailing_moe_v2"),
    "DeciLMForCausalLM": Row(
        written=_WRITTEN
        | {
            "rope_scaling": None,
            "block_configs": [
                {
                    "attention": {"n_heads_in_group": heads, "no_op": heads is None, "replace_with_linear": False},
                    "ffn": {"ffn_mult": factor, "no_op": factor is None, "replace_with_linear": False},
                }
                for heads, factor in ((2, 1.0), (None, 1.0), (2, None), (2, 4.0))
            ],
        }
    ),
    "DeepseekV2ForCausalLM": Row(values=_LATENT),
    "DeepseekV2ForCausalLM with q_lora_rank null": Row(values=_LATENT | {"q_lora_rank": None}),
    "DeepseekV3ForCausalLM": Row(values=_LATENT),
    "DeepseekV4ForCausalLM": Row(
        values={
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {"main": {"rope_type": "default", "rope_theta": 10000.0}, "compress": _YARN},
        },
        reason="Invalid experimental attention variant: dsv4_hybrid",  # of Megatron Core 0.19
    ),
    "Ernie4_5_MoeForCausalLM": Row(),
    "Ernie4_5_VLMoeForConditionalGeneration": Row(
        values={
            "tie_word_embeddings": True,
            "text_config": {
                "tie_word_embeddings": True,
                "moe_intermediate_size": [32, 32],
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
            },
        },
    ),
    "Exaone4ForCausalLM": Row(values=_TIED),
    "Exaone4_5_ForConditionalGeneration": Row(),
    "ExaoneMoEForCausalLM": Row(model="ExaoneMoeForCausalLM", published={"architectures": ["ExaoneMoEForCausalLM"]}),
    "ExaoneMoeForCausalLM": Row(),
    "FalconH1ForCausalLM": Row(
        values={
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_norm_before_gate": False,
        }
    ),
    "Gemma2ForCausalLM": Row(values=_TIED),
    "Gemma3ForCausalLM": Row(values=_TIED),
    "Gemma3ForConditionalGeneration": Row(
        values=_TIED | {"text_config": _TIED, "vision_config": {"vision_use_head": False}}
    ),
    "Gemma4ForCausalLM": Row(values=_TIED | _GEMMA_4),
    "Gemma4ForConditionalGeneration": Row(
        values=_TIED | {"text_config": _TIED | _GEMMA_4, "vision_config": _GEMMA_4_VISION}
    ),
    "GemmaForCausalLM": Row(values=_TIED),
    "Glm4MoeForCausalLM": Row(),
    "Glm4MoeLiteForCausalLM": Row(values=_LATENT),
    "Glm4vMoeForConditionalGeneration": Row(
        values={
            "text_config": {
                "head_dim": 16,
                "use_qk_norm": False,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [1, 1, 2],
                },
            }
        }
    ),
    "GlmMoeDsaForCausalLM": Row(
        values=_LATENT | {"index_head_dim": 32, "index_n_heads": 2}, published={"indexer_rope_interleave": True}
    ),
    "GptOssForCausalLM": Row(),
    "HYV3ForCausalLM": Row(published={"first_k_dense_replace": 1}),
    "HYV3ForCausalLM with num_nextn_predict_layers 1": Row(
        written=_WRITTEN_EXPERTS | {"model_type": "hy_v3", "router_scaling_factor": 1.0, "num_nextn_predict_layers": 1}
    ),
    "KimiK2ForCausalLM": Row(
        written=_WRITTEN_EXPERTS
        | _WRITTEN_LATENT
        | {"q_lora_rank": 32, "n_routed_experts": 4, "n_shared_experts": 1, "scoring_func": "sigmoid"}
    ),
    "LlamaForCausalLM": Row(),
    "MiMoForCausalLM": Row(written=_WRITTEN | {"num_nextn_predict_layers": 1}),
    "MiMoV2FlashForCausalLM": Row(
        written=_WRITTEN
        | {
            "layernorm_epsilon": 1e-6,
            "scoring_func": "sigmoid",
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "sliding_window_size": 32,
            "swa_rope_theta": 10000.0,
            "swa_num_key_value_heads": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_layer_freq": [0, 1, 1, 1],
            "attention_value_scale": 0.7,
            "partial_rotary_factor": 0.5,
        }
    ),
    "MiniMaxM2ForCausalLM": Row(),
    "MiniMaxM3SparseForConditionalGeneration": Row(
        values=_MINIMAX_M3, in_float32=("block_sparse_moe.gate.weight", "patch_embedding.weight")
    ),
    "MiniMaxM3SparseForConditionalGeneration with gates in bfloat16": Row(
        values=_MINIMAX_M3, reason="gate.weight is torch.float32, was torch.bfloat16"
    ),
    "Mistral3ForConditionalGeneration": Row(
        values={"text_config": {"rope_parameters": _MINISTRAL, "model_type": "ministral3"}}
    ),
    "Mistral3ForConditionalGeneration with a text model of Mistral": Row(
        values={"text_config": {"model_type": "mistral", "sliding_window": None}}
    ),
    "MistralForCausalLM": Row(),
    "NemotronForCausalLM": Row(values={"num_key_value_heads": 2}),
    "NemotronHForCausalLM": Row(
        values={
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "NemotronLabsDiffusionModel": Row(
        written=_WRITTEN | {"rope_parameters": _MINISTRAL, "num_attention_heads": 32, "num_key_value_heads": 8}
    ),
    "OlmoeForCausalLM": Row(values={"num_key_value_heads": 4}),
    "OlmoeForCausalLM with fewer key and value heads": Row(),
    "Qwen2AudioForConditionalGeneration": Row(),
    "Qwen2ForCausalLM": Row(),
    "Qwen2_5OmniForConditionalGeneration": Row(
        values={"enable_audio_output": False, "thinker_config": {"text_config": _SECTIONS}}
    ),
    "Qwen2_5_VLForConditionalGeneration": Row(values={"text_config": _SECTIONS}),
    "Qwen3ASRForConditionalGeneration": Row(
        written={
            "model_type": "qwen3_asr",
            "thinker_config": {
                "dtype": "bfloat16",
                "text_config": _WRITTEN | {"pad_token_id": 0, "rope_scaling": {"mrope_section": [3, 3, 2]}},
                "audio_config": {
                    "d_model": 32,
                    "encoder_layers": 2,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 64,
                    "output_dim": 64,
                    "downsample_hidden_size": 16,
                },
            },
        }
    ),
    "Qwen3ForCausalLM": Row(),
    "Qwen3MoeForCausalLM": Row(),
    "Qwen3NextForCausalLM": Row(),
    "Qwen3OmniMoeForConditionalGeneration": Row(
        values={"enable_audio_output": False, "thinker_config": {"text_config": _SECTIONS}}
    ),
    "Qwen3VLForConditionalGeneration": Row(),
    "Qwen3VLMoeForConditionalGeneration": Row(),
    "Qwen3_5ForCausalLM": Row(),
    "Qwen3_5ForConditionalGeneration": Row(),
    "Qwen3_5MoeForCausalLM": Row(),
    "Qwen3_5MoeForConditionalGeneration": Row(),
    "SarvamMLAForCausalLM": Row(written=_WRITTEN_EXPERTS | _WRITTEN_LATENT),
    "SarvamMoEForCausalLM": Row(written=_WRITTEN_EXPERTS),
    "Step3p5ForCausalLM": Row(written=_WRITTEN_EXPERTS | _STEP | {"model_type": "step3p5"}),
    "Step3p7ForConditionalGeneration": Row(
        written={
            "model_type": "step3p7",
            "text_config": _WRITTEN_EXPERTS | _STEP | {"dtype": "bfloat16"},
            "vision_config": {"width": 32, "layers": 2, "heads": 2, "image_size": 56, "mlp_ratio": 2.0},
            "image_token_id": 5,
        }
    ),
}


def _small(config: dict[str, Any], values: dict[str, Any], sizes: dict[str, Any] = _TEXT) -> dict[str, Any]:
    """Return a default config with small sizes, and then `values`."""
    made = {}
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            is_text = "text" in name or "thinker" in name
            made[name] = _small(value, values.get(name, {}), _TEXT if is_text else _TOWER)
        elif name in sizes and (value is not None or name == "head_dim"):
            made[name] = sizes[name]
        elif name not in _DERIVED:
            made[name] = value
    kept = {"model_type": config["model_type"]} if "model_type" in config else {}
    given = {
        name: value
        for name, value in values.items()
        if not isinstance(made.get(name), dict) or not name.endswith("_config")
    }
    return made | kept | given


def config(architecture: str) -> dict[str, Any]:
    """Return what a row says of config.json."""
    row = ROWS[architecture]
    return row.values | row.written | row.published | {"architectures": [architecture.partition(" ")[0]]}


def make_model(folder: Path, architecture: str) -> Path:
    """Write a tiny random checkpoint in bf16, and return its folder."""
    row = ROWS[architecture]
    torch.manual_seed(0)
    if row.written:
        _write_config(folder, architecture.partition(" ")[0], row.written)
        tensors = _mapped(folder)
    else:
        tensors = _made(folder, row, row.model or architecture.partition(" ")[0])
    for name, tensor in tensors.items():
        values = torch.randn(tensor.shape) * 0.1 + (tensor.dim() == 1)
        own = torch.bfloat16 if row.written else tensor.dtype
        tensors[name] = values.to(torch.float32 if name.endswith((*_IN_FLOAT32, *row.in_float32)) else own)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    train_tokenizer(folder, _TEXT["vocab_size"])
    if row.published:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | row.published, indent=2))
    return folder


def _made(folder: Path, row: Row, name: str) -> dict[str, torch.Tensor]:
    """Save a model of a class of transformers or of Bridge, and return its tensors."""
    made = model_class(name)
    config = made.config_class.from_dict(_small(made.config_class().to_dict(), row.values))
    made._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def model_class(name: str) -> Any:
    """Return a class of transformers, or the one of a module of Bridge."""
    if "." not in name:
        return getattr(transformers, name)
    (found,) = (each for each in vars(importlib.import_module(name)).values() if getattr(each, "__name__", "") in ROWS)
    return found


def _write_config(folder: Path, architecture: str, values: dict[str, Any]) -> None:
    """Write config.json as a model of the hub has it, with a class that takes every value."""
    folder.mkdir(parents=True)
    config = {"architectures": [architecture], "dtype": "bfloat16"} | values
    if "model_type" not in values:  # which Bridge has a class for
        code = {"AutoConfig": "configuration_tiny.Tiny", "AutoModelForCausalLM": f"modeling_tiny.{architecture}"}
        config |= {"model_type": "tiny", "auto_map": code}
        lines = [
            "from transformers import PretrainedConfig",
            "class Tiny(PretrainedConfig):",
            "    model_type = 'tiny'",
        ]
        (folder / "configuration_tiny.py").write_text("\n".join([*lines, ""]))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _mapped(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that an export of the bridge's own model has."""
    from megatron.bridge.host import accelerator

    mapped = bridge.AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    with accelerator.gloo_group(), torch.device("meta"):
        provider = mapped.to_megatron_provider(load_weights=False)
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        return dict(mapped.export_hf_weights(model, cpu=False, show_progress=False))
