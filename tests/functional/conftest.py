# SPDX-License-Identifier: Apache-2.0
"""What the functional tests share: platform, conversations, one checkpoint imported once, and the matrix's report."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


# A test process imports torch, transformers and Bridge; without bytecode files that takes three times as long.
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matrix  # noqa: E402
import models  # noqa: E402
import platforms  # noqa: E402
import primus  # noqa: E402
import steps  # noqa: E402
from chat import write_conversations  # noqa: E402
from report import Result, dumps, load, loads, show, succeeded, write  # noqa: E402
from rich.console import Console  # noqa: E402


RESULT = "result of a row"
ROWS = pytest.StashKey[list[matrix.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what chooses platform and rows."""
    group = parser.getgroup("matrix")
    group.addoption("--platform", choices=list(platforms.PLATFORMS), help="fail unless this platform is here")
    group.addoption("--all", action="store_true", help="every row of the matrix, not only the default set")
    group.addoption("--row", action="append", metavar="NAME", help="this row and no other test; can be repeated")
    group.addoption("--megatron-lm", type=Path, metavar="DIR", help="train with this checkout's pretrain_gpt.py --sft")
    group.addoption("--primus", type=Path, metavar="DIR", help="run the hook of this checkout of Primus")
    group.addoption("--report", type=Path, default=Path("out/functional"), metavar="DIR", help="logs and report")
    group.addoption("--kit", type=Path, metavar="DIR", help="prove this offline kit, with all that it does by itself")


def pytest_configure(config: pytest.Config) -> None:
    """Keep warnings and debug logs of the packages under test out of the report; their maintainers read them."""
    config.addinivalue_line("filterwarnings", "ignore")
    if config.option.showcapture == "all":
        config.option.showcapture = "stdout"
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config.option.report))
    if config.option.platform:
        os.environ[steps.PLATFORM_VARIABLE] = config.option.platform
    if config.option.platform == "cpu":
        # Before torch looks for devices: what is converted in this process shall not find them either.
        os.environ.update(platforms.PLATFORMS["cpu"].environment)
    if checkout := config.option.megatron_lm:
        if not (checkout / "pretrain_gpt.py").is_file():
            raise pytest.UsageError(f"{checkout} has no pretrain_gpt.py: give a checkout of Megatron-LM")
        os.environ[steps.MEGATRON_LM_VARIABLE] = str(checkout.resolve())
    if checkout := config.option.primus:
        if not (checkout / primus.HOOK).is_file():
            raise pytest.UsageError(f"{checkout} has no {primus.HOOK}: give a checkout of AMD-AGI/Primus")
        os.environ[primus.VARIABLE] = str(checkout.resolve())
    try:
        steps.host()
        config.stash[ROWS] = matrix.rows(config.option.row, config.option.all)
    except (platforms.PlatformError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each row."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.config.stash[ROWS]
        groups = [pytest.param(row, id=row.name, marks=pytest.mark.xdist_group(row.model)) for row in rows]
        metafunc.parametrize("row", groups)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass by the other modules where `--row` names rows, and on GPUs, for their figures are float32's on the CPU.

    A wheel without a change can't import the tests of that change.
    """
    other = collection_path.name.startswith("test_") and collection_path.name != "test_matrix.py"
    return True if other and (config.option.row or steps.host().platform.name != "cpu") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave only rows where `--row` names some."""
    if config.option.row:
        others = [item for item in items if "row" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail, in the process that others wait for, where rows were chosen and none of them ran."""
    kept = session.config.option.report / "results.json"
    if not hasattr(session.config, "workerinput") and kept.exists() and not succeeded(load(kept)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Show the report, in the process that has the terminal."""
    folder = config.option.report
    if (kept := folder / "results.json").exists():
        print()
        show(load(kept), Console(highlight=False))
        print(f"report: {folder / 'report.html'}")


class Reporter:
    """Takes the results of rows in the process that others wait for, whichever process ran them.

    The report is written anew with each: a job that is ended keeps what it has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: list[Result] = []
        (folder / "results.json").unlink(missing_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add what the test of a row gave to `add_to_report`."""
        for name, value in report.user_properties if report.when == "call" else ():
            if name == RESULT:
                self.results += loads(value)
                write(self.results, self.folder)


@pytest.fixture
def add_to_report(record_property: Callable[[str, str], None]) -> Callable[[Result], None]:
    """Give what takes a row's result."""
    return lambda result: record_property(RESULT, dumps([result]))


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
