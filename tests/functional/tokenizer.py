# SPDX-License-Identifier: Apache-2.0
"""Train a tokenizer like Llama 3's: byte-level BPE with Llama 3's special tokens and roles.

It also has the special tokens of NVIDIA's Nemotron Nano 2, because Megatron-LM's `SFTTokenizer` finds the assistant's
tokens in that template: it takes the first three tokens of a turn, a mark, "Assistant", and a newline, for the header.
"""

from pathlib import Path

from chat import conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


BEGIN, END, TURN, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
LLAMA = (BEGIN, END, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", TURN, "<|python_tag|>")
NEMOTRON = ("<unk>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "Assistant")
SPECIAL = LLAMA + NEMOTRON

# A header names the role, an empty line follows, and <|eot_id|> ends the turn.
CHAT_TEMPLATE = (
    "{%- if messages %}{{ bos_token }}{% endif -%}"
    "{%- for turn in messages -%}"
    "<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n{{ turn.content | trim }}<|eot_id|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif -%}"
)


def train_tokenizer(folder: Path, vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the project's conversations, and save it.

    Args:
        folder: The folder to save it to, in Hugging Face format.
        vocab_size: The number of tokens: 256 bytes, the special tokens, and merges for the rest.

    Returns:
        The tokenizer. Training needs no download, and gives the same merges each time.
    """
    model = Tokenizer(models.BPE(byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (message["content"] for messages in conversations(2000, seed=0) for message in messages)
    model.train_from_iterator(text, trainer)
    model.add_special_tokens(list(SPECIAL))  # after the text's tokens, as in Llama 3
    model.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, model.token_to_id(BEGIN))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=BEGIN,
        eos_token=TURN,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
