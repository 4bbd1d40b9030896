# SPDX-License-Identifier: Apache-2.0
"""Fixtures and hooks of the functional tests: platform, rows, conversations, and the report of the matrix."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


# A test process imports torch, transformers, and Bridge. Without bytecode files that takes three times as long.
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
    """Add the options of the matrix."""
    group = parser.getgroup("matrix")
    group.addoption(
        "--platform", choices=list(platforms.PLATFORMS), help="require this platform; default: the one that is found"
    )
    group.addoption("--all", action="store_true", help="run every row; default: the default set")
    group.addoption("--variants", action="store_true", help="every variant of a config, not only a dozen")
    group.addoption("--row", action="append", metavar="NAME", help="run only this row; can be repeated")
    group.addoption("--megatron-lm", type=Path, metavar="DIR", help="train with this checkout's pretrain_gpt.py --sft")
    group.addoption("--primus", type=Path, metavar="DIR", help="run the hook of this checkout of Primus")
    group.addoption(
        "--report", type=Path, default=Path("out/functional"), metavar="DIR", help="default: out/functional"
    )
    group.addoption("--kit", type=Path, metavar="DIR", help="test this offline kit")


def pytest_configure(config: pytest.Config) -> None:
    """Hide warnings and debug logs of packages, which are for their maintainers, and apply the options."""
    config.addinivalue_line("filterwarnings", "ignore")
    if config.option.showcapture == "all":
        config.option.showcapture = "stdout"
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config.option.report))
    if config.option.platform:
        os.environ[steps.PLATFORM_VARIABLE] = config.option.platform
    if config.option.platform == "cpu":
        # Set these before torch looks for devices, so that conversions in this process use the CPU too.
        os.environ.update(platforms.PLATFORMS["cpu"].environment)
    if checkout := config.option.megatron_lm:
        if not (checkout / "pretrain_gpt.py").is_file():
            raise pytest.UsageError(f"{checkout} has no pretrain_gpt.py: pass a checkout of Megatron-LM")
        os.environ[steps.MEGATRON_LM_VARIABLE] = str(checkout.resolve())
    if checkout := config.option.primus:
        if not (checkout / primus.HOOK).is_file():
            raise pytest.UsageError(f"{checkout} has no {primus.HOOK}: pass a checkout of AMD-AGI/Primus")
        os.environ[primus.VARIABLE] = str(checkout.resolve())
    try:
        steps.host()
        config.stash[ROWS] = matrix.rows(config.option.row, config.option.all)
    except (platforms.PlatformError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each row a test."""
    if "row" in metafunc.fixturenames:
        rows = metafunc.config.stash[ROWS]
        groups = [pytest.param(row, id=row.name, marks=pytest.mark.xdist_group(row.model)) for row in rows]
        metafunc.parametrize("row", groups)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the other modules with `--row`, and on GPUs, because their figures are for float32 on the CPU.

    With `--row`, the wheel may lack a change, and can't import the tests of that change.
    """
    other = collection_path.name.startswith("test_") and collection_path.name != "test_matrix.py"
    return True if other and (config.option.row or steps.host().platform.name != "cpu") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all other tests with `--row`."""
    if config.option.row:
        others = [item for item in items if "row" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail in the main process unless a row passed and none failed."""
    kept = session.config.option.report / "results.json"
    if not hasattr(session.config, "workerinput") and kept.exists() and not succeeded(load(kept)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(config: pytest.Config) -> None:
    """Show the report."""
    folder = config.option.report
    if (kept := folder / "results.json").exists():
        print()
        show(load(kept), Console(highlight=False))
        print(f"report: {folder / 'report.html'}")


class Reporter:
    """Collects the results of rows from all processes in the main process.

    It writes the report after each result, so that a job that is stopped keeps its results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: list[Result] = []
        (folder / "results.json").unlink(missing_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the result that the test of a row passed to `add_to_report`."""
        for name, value in report.user_properties if report.when == "call" else ():
            if name == RESULT:
                self.results += loads(value)
                write(self.results, self.folder)


@pytest.fixture
def add_to_report(record_property: Callable[[str, str], None]) -> Callable[[Result], None]:
    """Return a function that adds a row's result to the report."""
    return lambda result: record_property(RESULT, dumps([result]))


@pytest.fixture(scope="session")
def reports(pytestconfig: pytest.Config) -> Path:
    """Return the folder of report and logs, which outlives the session."""
    folder = pytestconfig.option.report.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of this session. `--basetemp DIR` chooses it. It stays after a failure."""
    return tmp_path_factory.mktemp("functional")


@pytest.fixture(scope="session")
def llama(workplace: Path) -> Path:
    """Make a tiny Llama 3 in Hugging Face format."""
    return models.make_model(workplace / "hf" / "llama-3")


@pytest.fixture(scope="session")
def chats(workplace: Path, llama: Path) -> steps.Chats:
    """Write conversations for training and held-out ones."""
    return steps.Chats(
        train=write_conversations(workplace / "chats" / "train.jsonl", 128),
        valid=write_conversations(workplace / "chats" / "valid.jsonl", 32, seed=2),
        tokenizer=llama,
    )
