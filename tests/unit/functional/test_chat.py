# SPDX-License-Identifier: Apache-2.0
"""Which tokens carry loss: what the assistant says, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chat import IGNORE_INDEX, ChatTokenizer, spoken, write_conversations
from steps import Chats
from tokenizer import TURN, train_tokenizer


TWO_TURNS = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is 1 plus 2?"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "How many letters has sage?"},
    {"role": "assistant", "content": "The word sage has 4 letters."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return ChatTokenizer(str(folder))


def test_targets_are_the_answers_and_the_ends_of_their_turns(tokenizer: ChatTokenizer) -> None:
    tokens, targets = tokenizer.tokenize_conversation(TWO_TURNS, return_target=True)
    said = tokenizer.tokenizer.decode(targets[targets != IGNORE_INDEX])
    assert said == f"It is 3.{TURN}The word sage has 4 letters.{TURN}"
    assert (targets[targets != IGNORE_INDEX] == tokens[targets != IGNORE_INDEX]).all()


def test_a_line_may_hold_several_conversations() -> None:
    assert spoken(TWO_TURNS * 2) == ["It is 3.The word sage has 4 letters."] * 2


@pytest.fixture
def chats(tokenizer: ChatTokenizer, tmp_path: Path) -> Chats:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"messages": TWO_TURNS}) + "\n")
    valid = write_conversations(tmp_path / "valid.jsonl", 1)
    return Chats(train, valid, tokenizer.tokenizer.name_or_path)


@pytest.mark.parametrize(
    ("length", "with_loss", "wrong"),
    [
        (None, lambda targets: targets != IGNORE_INDEX, []),
        (None, np.ones_like, ["system\n\nAnswer"]),
        (None, lambda targets: targets == IGNORE_INDEX, ["system\n\nAnswer"]),
        # Every row is cut off: then nothing shows where an answer ends.
        (-3, lambda targets: targets != IGNORE_INDEX, ["It is 3."]),
    ],
    ids=["the assistant's", "all", "the others'", "cut off"],
)
def test_loss_on_others_is_found(chats: Chats, tokenizer: ChatTokenizer, length, with_loss, wrong: list[str]) -> None:
    tokens, targets = tokenizer.tokenize_conversation(TWO_TURNS, return_target=True)
    mask = np.asarray(with_loss(targets), dtype=np.float32)
    batch = {"labels": torch.tensor(tokens[None, :length]), "loss_mask": torch.tensor(mask[None, :length])}
    found = chats.said_by_others([batch])
    assert len(found) == len(wrong)
    assert all(text.startswith(start) for text, start in zip(found, wrong, strict=True))


def test_a_conversation_that_is_cut_off_beside_a_whole_one_is_the_assistant_s(
    chats: Chats, tokenizer: ChatTokenizer
) -> None:
    tokens, targets = map(torch.tensor, tokenizer.tokenize_conversation(TWO_TURNS, return_target=True))
    whole, cut = (targets != IGNORE_INDEX).float(), (targets != IGNORE_INDEX).float()
    cut[-3:] = 0
    batch = {"labels": torch.stack([tokens, tokens]), "loss_mask": torch.stack([whole, cut])}
    assert chats.said_by_others([batch]) == []
