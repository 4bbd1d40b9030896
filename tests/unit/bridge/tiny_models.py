# SPDX-License-Identifier: Apache-2.0
"""Models of every family that the tests convert, at a size that takes milliseconds, and how to look at a payload."""

import torch
import torch.distributed.checkpoint as dcp
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


PAYLOAD = {".metadata", "__0_0.distcp", "common.pt", "metadata.json", "run_config.yaml", "tokenizer"}

_DIMENSIONS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 256,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# family: (config class, architecture, values)
FAMILIES = {
    "llama-2": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3": ("LlamaConfig", "LlamaForCausalLM", {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("LlamaConfig", "LlamaForCausalLM", {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3_ROPE}),
    "llama-3.2": ("LlamaConfig", "LlamaForCausalLM", {"rope_theta": 500000.0, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 16, "num_experts": 4, **_MOE}),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_LATENT, **_MOE}),
}


def hf_config(family: str, **changes) -> transformers.PretrainedConfig:
    """The config of a tiny model of `family`, with `changes` to its values."""
    config_class, architecture, values = FAMILIES[family]
    return getattr(transformers, config_class)(**_DIMENSIONS | values | changes, architectures=[architecture])


def save_hf_model(folder, family="llama-3", tokens=300, **changes):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(hf_config(family, **changes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    wrapped.save_pretrained(folder)
    return folder


def names(payload):
    """What lies in a payload, without the model's own files: test_model_files.py."""
    return {path.name for path in payload.iterdir()} - {"hf"}


def weights(payload):
    """Every tensor of a checkpoint by key, whole, read with PyTorch alone."""
    entries = dcp.FileSystemReader(payload).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=payload, no_dist=True)
    return tensors


def assert_same_weights(left, right):
    assert left.keys() == right.keys() and left
    for key in left:
        assert torch.equal(left[key], right[key]), key
