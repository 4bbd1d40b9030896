# SPDX-License-Identifier: Apache-2.0
"""A Llama-3-style tokenizer that is trained here: byte-level BPE with Llama 3's special tokens and roles.

It has those of NVIDIA's Nemotron Nano 2, too, whose template is the one in which Megatron-LM's `SFTTokenizer` finds
what the assistant says: it takes a turn's first three tokens, a mark, "Assistant" and a new line, for its header.
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
    """Train a tokenizer on conversations that the project makes, and save it.

    Args:
        folder: Where it goes, in Hugging Face's form.
        vocab_size: Tokens in all: 256 bytes, the special ones, and merges for the rest.

    Returns:
        The tokenizer. Training needs no download and gives the same merges each time.
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
    model.add_special_tokens(list(SPECIAL))  # behind the text's tokens, as Llama 3 has them
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
