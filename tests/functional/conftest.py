# SPDX-License-Identifier: Apache-2.0
"""What the functional tests share: platform, conversations, one checkpoint imported once, and the matrix's report."""

import os
import sys
from pathlib import Path

import pytest


# A test process imports torch, transformers and Bridge; without bytecode files that takes three times as long.
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matrix  # noqa: E402
import models  # noqa: E402
import platforms  # noqa: E402
import report  # noqa: E402
import steps  # noqa: E402
from chat import write_conversations  # noqa: E402
from rich.console import Console  # noqa: E402


RESULTS = pytest.StashKey[list[report.Result]]()
ROWS = pytest.StashKey[list[matrix.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what chooses platform and rows."""
    group = parser.getgroup("matrix")
    group.addoption("--platform", choices=list(platforms.PLATFORMS), help="fail unless this platform is here")
    group.addoption("--all", action="store_true", help="every row of the matrix, not only the default set")
    group.addoption("--row", action="append", metavar="NAME", help="this row and no other test; can be repeated")
    group.addoption("--report", type=Path, default=Path("out/functional"), metavar="DIR", help="logs and report")


def pytest_configure(config: pytest.Config) -> None:
    """Keep warnings and debug logs of the packages under test out of the report; their maintainers read them."""
    config.addinivalue_line("filterwarnings", "ignore")
    if config.option.showcapture == "all":
        config.option.showcapture = "stdout"
    config.stash[RESULTS] = []
    if config.option.platform:
        os.environ[steps.PLATFORM_VARIABLE] = config.option.platform
    try:
        steps.host()
        config.stash[ROWS] = matrix.rows(config.option.row, config.option.all)
    except (platforms.PlatformError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each row."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.config.stash[ROWS]
        metafunc.parametrize("row", rows, ids=[row.name for row in rows])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave only rows where `--row` names some."""
    if config.option.row:
        others = [item for item in items if "row" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report the rows that were run."""
    if results := session.config.stash[RESULTS]:
        folder = session.config.option.report
        report.write(results, folder)
        print()
        report.show(results, Console(highlight=False))
        print(f"report: {folder / 'report.html'}")


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> list[report.Result]:
    """Give the list that the report is made of."""
    return pytestconfig.stash[RESULTS]


@pytest.fixture(scope="session")
def reports(pytestconfig: pytest.Config) -> Path:
    """Give the folder of report and logs, which outlives the session."""
    folder = pytestconfig.option.report.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
