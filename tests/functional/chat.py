# SPDX-License-Identifier: Apache-2.0
"""Make conversations for fine-tuning, and tokenize them as Megatron-LM's `SFTDataset` asks.

The conversations come from a fixed seed, so every run sees the same text. They are small sums and word games whose
answers follow a rule, so the loss of a small model falls within a few iterations.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


IGNORE_INDEX = -100  # `megatron/training/datasets/sft_dataset.py`, core 0.19.2: labels with this value get no loss

Message = dict[str, str]

_SYSTEM = "Answer in one short sentence."
_WORDS = (
    "amber basil cedar dune ember fjord grove heron iris juniper kelp lichen maple nectar olive pebble quartz sage"
)


def conversations(count: int, seed: int = 1) -> Iterator[list[Message]]:
    """Yield conversations of a system message and one or two turns.

    Args:
        count: The number of conversations.
        seed: Another seed gives other conversations of the same kind.
    """
    dice = random.Random(seed)
    for _ in range(count):
        messages = [{"role": "system", "content": _SYSTEM}]
        for _ in range(dice.choice((1, 1, 2))):
            question, answer = dice.choice((_sum, _order, _count))(dice)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages


def _sum(dice: random.Random) -> tuple[str, str]:
    first, second = dice.randrange(10), dice.randrange(10)
    return f"What is {first} plus {second}?", f"It is {first + second}."


def _order(dice: random.Random) -> tuple[str, str]:
    words = dice.sample(_WORDS.split(), 2)
    return f"Which comes first, {words[0]} or {words[1]}?", f"First comes {min(words)}."


def _count(dice: random.Random) -> tuple[str, str]:
    word = dice.choice(_WORDS.split())
    return f"How many letters has {word}?", f"The word {word} has {len(word)} letters."


def write_conversations(path: Path, count: int, seed: int = 1, together: int = 1) -> Path:
    """Write conversations as JSON lines, each `{"messages": […]}`, as Megatron-LM's `SFTDataset` reads them.

    Args:
        path: The file.
        count: The number of conversations.
        seed: Another seed gives other conversations.
        together: The number of conversations in a line. `SFTDataset` packs a line into one sequence. A system message
            begins each conversation.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for group in itertools.batched(conversations(count, seed), together):
            out.write(json.dumps({"messages": list(itertools.chain(*group))}) + "\n")
    return path


def spoken(messages: list[Message]) -> list[str]:
    """Return the assistant's words, one text for each conversation of a line."""
    texts: list[str] = []
    for message in messages:
        if message["role"] == "system":
            texts.append("")
        elif message["role"] == "assistant":
            texts[-1] += message["content"]
    return texts


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template, as `SFTDataset` calls it (`tokenize_conversation`, `eod`, `pad`).

    Megatron-LM's own `SFTTokenizer` finds the assistant's tokens for two of NVIDIA's templates only, and puts the loss
    on every token for any other ("default"). This one finds them for any template.

    Args:
        folder: A folder or the name of a model with a tokenizer.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {folder} has no chat template; add one to tokenize conversations")
        self.vocab_size = len(self.tokenizer)
        self.eod = self.tokenizer.eos_token_id
        self.pad = self.eod if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.unique_identifiers = {"class": type(self).__name__, "folder": folder}

    def tokenize_conversation(
        self, conversation: list[Message], return_target: bool, add_generation_prompt: bool = False
    ) -> Any:
        """Return the tokens of a conversation and, with `return_target`, the tokens that carry loss.

        Args:
            conversation: Messages with "role" and "content".
            return_target: Return the targets too.
            add_generation_prompt: End with the header of the next answer.

        Returns:
            int64 `[sequence]`, or a pair of those, the second with `IGNORE_INDEX` where the assistant doesn't speak.

        Raises:
            ValueError: The template changes earlier tokens when a message is added, so the assistant's tokens can't be
                found.
        """
        tokens = self._tokens(conversation, add_generation_prompt)
        if not return_target:
            return tokens
        targets = np.full_like(tokens, IGNORE_INDEX)
        for place, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            start = self._tokens(conversation[:place], True)
            end = self._tokens(conversation[: place + 1], False)
            if not (_begins(end, start) and _begins(tokens, end)):
                raise ValueError(
                    f"the chat template changes the tokens of message {place} when more follow; use one that appends"
                )
            targets[len(start) : len(end)] = tokens[len(start) : len(end)]
        return tokens, targets

    def _tokens(self, messages: list[Message], add_generation_prompt: bool) -> np.ndarray:
        ids = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
        )["input_ids"]
        return np.asarray(ids, dtype=np.int64)


def _begins(whole: np.ndarray, start: np.ndarray) -> bool:
    return len(start) <= len(whole) and bool((whole[: len(start)] == start).all())
