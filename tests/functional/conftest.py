# SPDX-License-Identifier: Apache-2.0
"""What the functional tests share: conversations, and one checkpoint imported once."""

import os
import sys
from pathlib import Path

import pytest


# A test process imports torch, transformers and Bridge; without bytecode files that takes three times as long.
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import models  # noqa: E402
import steps  # noqa: E402
from chat import write_conversations  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Keep warnings and debug logs of the packages under test out of the report; their maintainers read them."""
    config.addinivalue_line("filterwarnings", "ignore")
    if config.option.showcapture == "all":
        config.option.showcapture = "stdout"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this session. `--basetemp DIR` chooses where; it stays after a failure."""
    return tmp_path_factory.mktemp("functional")


@pytest.fixture(scope="session")
def llama(workplace: Path) -> Path:
    """Make a tiny Llama 3 in Hugging Face's form."""
    return models.make_model(workplace / "hf" / "llama-3")


@pytest.fixture(scope="session")
def chats(workplace: Path, llama: Path) -> steps.Chats:
    """Write the conversations to train on, and others to be judged by."""
    return steps.Chats(
        train=write_conversations(workplace / "chats" / "train.jsonl", 128),
        valid=write_conversations(workplace / "chats" / "valid.jsonl", 32, seed=2),
        tokenizer=llama,
    )
