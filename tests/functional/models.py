# SPDX-License-Identifier: Apache-2.0
"""Make Hugging Face checkpoints to convert: a tiny random one of each family, and one with Llama-3-8B's real width.

A family is a row: the class of its configuration in transformers, and the values in which it differs from `_TINY`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizer import train_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers


# How Qwen 2 splits text before it is encoded.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB_SIZE = 384  # a multiple of 128, so that one rank of Megatron-LM pads nothing

_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # Wide enough that a wrong rotary base or norm epsilon moves the loss by more than rounding does.
    "initializer_range": 0.1,
}


def _rope(base: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_theta": base, **({"rope_type": "default"} | scaling)}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return _rope(
        500000.0,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@dataclass(frozen=True)
class Family:
    """A family: its configuration class in transformers, and the values that differ from `_TINY`."""

    name: str
    config: str
    values: dict[str, Any] = field(default_factory=dict)

    def configuration(self, **changes: Any) -> transformers.PretrainedConfig:
        """Return the configuration of a tiny model of this family.

        Args:
            **changes: Values that override the family's own.
        """
        return getattr(transformers, self.config)(**(_TINY | self.values | changes))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama-2",
            "LlamaConfig",
            {"num_key_value_heads": 4, "rope_parameters": _rope(10000.0), "rms_norm_eps": 1e-5},
        ),
        Family("llama-3", "LlamaConfig", {"rope_parameters": _rope(500000.0), "rms_norm_eps": 1e-5}),
        Family(
            "llama-3.1",
            "LlamaConfig",
            {"rope_parameters": _llama3_rope(8.0), "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
        ),
        Family(
            "llama-3.2",
            "LlamaConfig",
            {
                "rope_parameters": _llama3_rope(32.0),
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "mistral",
            "MistralConfig",
            {"rope_parameters": _rope(1000000.0), "rms_norm_eps": 1e-5, "sliding_window": None},
        ),
        Family("qwen2", "Qwen2Config", {"rope_parameters": _rope(1000000.0), "rms_norm_eps": 1e-6}),
        Family("qwen3", "Qwen3Config", {"rope_parameters": _rope(1000000.0), "rms_norm_eps": 1e-6, "head_dim": 32}),
        Family(
            "qwen3-moe",
            "Qwen3MoeConfig",
            {
                "rope_parameters": _rope(1000000.0),
                "rms_norm_eps": 1e-6,
                "head_dim": 32,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
            },
        ),
        Family(
            "deepseek-v3",
            "DeepseekV3Config",
            {
                "rope_parameters": _rope(10000.0),
                "num_key_value_heads": 4,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 32,
                "first_k_dense_replace": 1,
            },
        ),
    )
}


_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

# Families that convert, too. Not all can be told to Megatron-LM in flags, or trained without Transformer Engine.
_FURTHER = (
    Family("deepseek-v2", "DeepseekV2Config", _LATENT | _EXPERTS | {"head_dim": 16}),
    Family("deepseek-v3-mtp", "DeepseekV3Config", _LATENT | _EXPERTS | {"num_nextn_predict_layers": 1}),
    Family("gemma", "GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    Family("glm-4.5", "Glm4MoeConfig", _EXPERTS | {"head_dim": 16, "num_nextn_predict_layers": 0}),
    Family("glm-4.5-mtp", "Glm4MoeConfig", _EXPERTS | {"head_dim": 16, "num_nextn_predict_layers": 1}),
    Family("glm-4-moe-lite", "Glm4MoeLiteConfig", _LATENT | _EXPERTS | {"num_nextn_predict_layers": 0}),
    Family(
        "gpt-oss",
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    Family(
        "hy-v3",
        "HYV3Config",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            # transformers says it by `mlp_layer_types` alone, Bridge reads what Tencent's own config.json has.
            "first_k_dense_replace": 1,
        },
    ),
    Family("nemotron", "NemotronConfig", {"head_dim": 16}),
    Family("olmoe", "OlmoeConfig", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
)
CONVERTED = FAMILIES | {family.name: family for family in _FURTHER}


def make_model(
    folder: Path,
    family: str | Family = "llama-3",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[torch.nn.Module], None] = lambda model: None,
    **changes: Any,
) -> Path:
    """Write a tiny random checkpoint of a family, with a tokenizer and a chat template.

    Args:
        folder: The folder of the checkpoint.
        family: A key of `CONVERTED`, or another family.
        dtype: The dtype of the stored weights.
        prepare: Changes the weights before they are stored.
        **changes: Values of the configuration that override the family's own.

    Returns:
        `folder`.
    """
    tokenizer = train_tokenizer(folder, VOCAB_SIZE)
    row = CONVERTED[family] if isinstance(family, str) else family
    config = row.configuration(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _disturb(model)
    prepare(model)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # DeepSeek stores it in float32, whatever the dtype of the weights
    model.save_pretrained(folder)
    return folder


def as_published(folder: Path) -> Path:
    """Rewrite a checkpoint of `make_model` like a published model of transformers 4, with the usual extra files.

    Args:
        folder: The checkpoint, which is changed.

    Returns:
        `folder`.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.43.0.dev0"}
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    files = {"config.json": config, "special_tokens_map.json": special}
    tokenizer = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if config["model_type"] == "qwen2":
        tokenizer = special | {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None}
        del files["special_tokens_map.json"]
        _split_as_qwen(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    template = folder / "chat_template.jinja"
    files["tokenizer_config.json"] = tokenizer | {
        "added_tokens_decoder": {token.pop("id"): token for token in added},
        "chat_template": template.read_text(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    template.unlink()
    files["generation_config.json"] = {"do_sample": True, "top_p": 0.9, "transformers_version": "4.43.0.dev0"}
    for name, content in files.items():
        (folder / name).write_text(f"{json.dumps(content, indent=2)}\n")
    (folder / "LICENSE").write_text("A license.\n")
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    (folder / "modeling_tiny.py").write_text('raise SystemExit("the code of a model ran")\n')
    return folder


def _split_as_qwen(folder: Path) -> None:
    """Make the tokenizer of a checkpoint split text like Qwen 2.5, and write its two older files."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    digits = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.normalizer = normalizers.NFC()
    content = json.loads(tokenizer.to_str()) | {"post_processor": None}
    path.write_text(json.dumps(content, indent=2))
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def _disturb(model: torch.nn.Module) -> None:
    """Change norms from 1 and biases from 0, so that a converter that drops or swaps them is noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.05)


LLAMA_3_8B_WIDTH = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(500000.0),
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_wide_model(folder: Path) -> Path:
    """Write a checkpoint with Llama-3-8B's width and vocabulary and 2 of its 32 layers: bf16, 3 GB, 4 shards, index.

    The tensors are drawn and written one shard at a time, so the peak memory is one shard, at most 2.8 GB. The
    tokenizer is small, but the configuration has the real size of the vocabulary.
    """
    tokenizer = train_tokenizer(folder, VOCAB_SIZE)
    config = transformers.LlamaConfig(
        **LLAMA_3_8B_WIDTH,
        architectures=["LlamaForCausalLM"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    shards = _split(list(shapes), shards=4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000_003, generator=generator).mul_(0.02).to(torch.bfloat16)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(2 * shape.numel() for shape in shapes.values())},
        "weight_map": {},
    }
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _draw(shapes[name], noise, generator) for name in names}, folder / shard, metadata={"format": "pt"}
        )
        index["weight_map"].update(dict.fromkeys(names, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _split(names: list[str], shards: int) -> list[list[str]]:
    size = -(-len(names) // shards)
    return [names[start : start + size] for start in range(0, len(names), size)]


def _draw(shape: torch.Size, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill a tensor from noise of prime length, so that no two rows are equal. New noise would take a minute."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=noise.dtype)
    start = int(torch.randint(len(noise), (1,), generator=generator))
    repeats = -(-(start + shape.numel()) // len(noise))
    return noise.repeat(repeats)[start : start + shape.numel()].reshape(shape).clone()


def copy_model(source: Path, folder: Path) -> Path:
    """Copy a checkpoint for a test that damages it."""
    return Path(shutil.copytree(source, folder))
