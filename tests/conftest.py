# SPDX-License-Identifier: Apache-2.0
"""Prints how often something was tried: what a test prints itself is lost in a worker of pytest-xdist.

And says which tests share what they made, and keeps the garbage collection away from the modules that the tests
import, which are thousands.
"""

import gc
import os
from collections import Counter

import pytest


COUNT = "count of "

gc.disable()

# The proof of an import takes half a minute. The tests of proofs ask for theirs.
PROOF = "MEGATRON_BRIDGE_IN_PROOF"
os.environ[PROOF] = "1"


@pytest.fixture(autouse=True)
def proofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "verify" in request.path.name:
        monkeypatch.delenv(PROOF)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run a file's tests, unless they are in groups of their own."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_collection_finish() -> None:
    """Leave out of each later collection what is imported by now."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what tests gave to `record_property("count of something", number)`, in the process with the terminal."""
    tried, tests = Counter(), Counter()
    for report in terminalreporter.getreports("passed"):
        counts = [(name, number) for name, number in report.user_properties if name.startswith(COUNT)]
        for name, number in counts:
            tried[name.removeprefix(COUNT)] += number
        tests.update({name.removeprefix(COUNT) for name, _ in counts})
    if tried:
        terminalreporter.section("counts")
    for what, number in sorted(tried.items()):
        terminalreporter.write_line(f"{number:>6} {what}, in {tests[what]} test{'s' * (tests[what] > 1)}")
