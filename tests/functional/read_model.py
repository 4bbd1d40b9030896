# SPDX-License-Identifier: Apache-2.0
"""Print as JSON what this environment's transformers reads from Hugging Face models: `read_model.py FOLDER...`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


TEXT = "How many ships sail from Ōsaka to the harbour?\n\n  12 + 30 = 42"


def read(folder: str) -> dict:
    """Return the outputs of a folder's tokenizer, and of its model if it has weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    found = {
        "tokens": tokens[0].tolist(),
        "text": tokenizer.decode(tokens[0]),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False),
        "eos": tokenizer.eos_token_id,
    }
    if not Path(folder, "model.safetensors").exists():
        return found
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.inference_mode():
        logits = model(tokens).logits[0, -1].tolist()
    config = AutoConfig.from_pretrained(folder).to_dict()
    return found | {"logits": logits, "config": {key: config[key] for key in config if key != "_name_or_path"}}


if __name__ == "__main__":
    print(json.dumps({folder: read(folder) for folder in sys.argv[1:]}))
