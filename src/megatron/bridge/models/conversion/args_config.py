# SPDX-License-Identifier: Apache-2.0
"""A config.json for a checkpoint that names no Hugging Face model, from Megatron-LM's args alone.

Each family's config is given the values of the args, as at an export. The first whose model has all of them is taken.
"""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import transformers

from megatron.bridge.models.conversion import trained_config
from megatron.bridge.models.conversion.trained_weights import stored_rows, true_vocabulary
from megatron.bridge.release_checkpoint.architecture import facts
from megatron.bridge.release_checkpoint.layout import resolve_checkpoint
from megatron.bridge.release_checkpoint.payload import Payload, examine_payload, refuse_damage


logger = logging.getLogger(__name__)

# The simplest first: several families are the same model where one has no more than the other.
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "NemotronForCausalLM")
SPARSE = ("Qwen3MoeForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM")
_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization", "layernorm_epsilon"),
    *("activation", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rope", "tied"),
)
# Defaults of the families that no args say.
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window")),
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def config_of_args(megatron_path: str | os.PathLike) -> transformers.PretrainedConfig:
    """Return a Hugging Face config that says what the args of a checkpoint say. Reads no weights.

    Args:
        megatron_path: Checkpoint root or payload folder, a local path.

    Raises:
        ValueError: The checkpoint has no args, they don't say enough, or none of `DENSE` and `SPARSE` is such a model.
    """
    payload = examine_payload(Path(resolve_checkpoint(megatron_path)))
    refuse_damage(payload)
    remedy = "pass the trained Hugging Face model with --hf-model"
    said = vars(payload.args) | facts(payload.args) if payload.args is not None else {}
    if missing := [name for name in _NEEDED if said.get(name) is None]:
        raise ValueError(f"the args of {payload.path} don't say {', '.join(missing[:3])}: {remedy}")
    refused, families = [], SPARSE if said.get("num_experts") else DENSE
    for architecture in families:
        try:
            config = _config_of(architecture, payload)
        except ValueError as error:
            logger.debug("%s: %s", architecture, error)
            refused.append(f"{architecture}: {str(error).partition(' can say: ')[2].partition('. ')[0] or error}")
        else:
            logger.warning(
                "config.json is made of Megatron-LM's args alone, as %s: without a tokenizer, and without the special "
                "tokens; pass the trained Hugging Face model with --hf-model to get its own",
                architecture,
            )
            return config
    raise ValueError(f"no family of {', '.join(families)} is the model of {payload.path} ({refused[0]}): {remedy}")


def _config_of(architecture: str, payload: Payload) -> transformers.PretrainedConfig:
    from megatron.bridge import AutoBridge

    args: Any = payload.args
    kind = getattr(transformers, architecture).config_class
    values = _PLAIN | {
        "vocab_size": true_vocabulary(args) or stored_rows(payload),
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_attention_heads,
        "max_position_embeddings": getattr(args, "max_position_embeddings", None) or args.seq_length,
    }
    known = kind().to_dict()
    values = {key: value for key, value in values.items() if key in known}
    usual = args.hidden_size // args.num_attention_heads
    size = getattr(args, "kv_channels", None) or usual
    # Models read it, though not every config has a default of it.
    if not getattr(args, "multi_latent_attention", False) and ("head_dim" in known or size != usual):
        values["head_dim"] = size
    config = kind(**values, architectures=[architecture])
    bridge = AutoBridge.from_hf_config(config)
    with trained_config.as_trained(bridge, payload.path):
        changed: Any = bridge.hf_pretrained
        return copy.deepcopy(changed)
