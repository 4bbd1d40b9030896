# SPDX-License-Identifier: Apache-2.0
"""Upstream's unit tests of what a commit touches, compared with what they did before the stack.

Run as a script, it runs pytest in checkouts on a host without a GPU and without Transformer Engine.
"""

import ast
import contextlib
import gc
import hashlib
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock


UNIT_TESTS = Path("tests", "unit_tests")
REPORT, LOG, LOADED = "report.xml", "log.txt", "loaded.txt"
"""What a run of pytest leaves: its report, its output, and the names of what it imported from outside the tree."""


class Comparison:
    """Compares the outcomes of tests after each commit with those before the first.

    The import of Megatron-Bridge takes ten times as long as most of its tests. So pytest runs in forks of one process,
    which has imported everything else.

    Args:
        python: the interpreter of an environment that has what Megatron-Bridge and its tests import.
        before: a checkout as it was before the first commit.
        kept: the folder that keeps the outcomes, by the content of a checkout, for the next time.
    """

    def __init__(self, python: Path, before: Path, kept: Path):
        self.python, self.before, self.kept = python, before, kept
        self.files: set[Path] = set()
        self.outcomes: dict[str, str] = {}

    @cached_property
    def _server(self) -> subprocess.Popen:
        command = [str(self.python), __file__]
        # A test that asks the hub would tell of the network, after waits of minutes where there is none.
        environment = {"HF_HUB_OFFLINE": "1", **os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *error: object) -> None:
        if "_server" in vars(self):
            self._server.communicate()

    def worse(self, tree: Path, touched: Iterable[str]) -> list[str]:
        """Returns, one a line, the tests that passed before and don't now, and new ones that don't pass.

        Args:
            tree: a checkout with the commit.
            touched: the files of the commit.
        """
        files = find_tests(tree, touched)
        new = [file for file in files if file not in self.files and (self.before / file).is_file()]
        self.outcomes |= self._outcomes(self.before, new)
        self.files |= set(files)
        after = self._outcomes(tree, files)
        worse = [
            f"{test}: {outcome}, was {self.outcomes.get(test, 'not there')}"
            for test, outcome in after.items()
            if outcome not in ("passed", "skipped") and self.outcomes.get(test) not in ("failed", "error")
        ]
        modules = tuple(".".join(file.with_suffix("").parts) + "." for file in files)
        for name, outcomes in {"before the first commit": self._among(modules), "with this commit": after}.items():
            counts = Counter(outcomes.values())
            told = ", ".join(f"{counts[each]} {each}" for each in sorted(counts))
            print(f"  {name}: {told or 'none'}", file=sys.stderr)
        lost = [test for test in self._among(modules) if test not in after]
        worse += [f"{test}: not run, was {self.outcomes[test]}" for test in lost]
        print(*(f"  {each}\n" for each in worse), sep="", end="", file=sys.stderr, flush=True)
        return worse

    def _among(self, modules: tuple[str, ...]) -> dict[str, str]:
        """The outcomes before the first commit of the tests in `modules`, each of which ends in a dot."""
        return {test: outcome for test, outcome in self.outcomes.items() if test.startswith(modules)}

    def _outcomes(self, tree: Path, files: list[Path]) -> dict[str, str]:
        """The outcome of each test by its name."""
        if not files:
            return {}
        command = ["git", "rev-parse", "HEAD:src", "HEAD:tests"]
        content = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
        key = hashlib.sha256("\n".join([content, str(self.python), *map(str, files)]).encode()).hexdigest()
        kept = self.kept / f"{key}.json"
        if not kept.is_file():
            outcomes = self._run(tree, files)
            self.kept.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(outcomes), "utf-8")
        return json.loads(kept.read_text("utf-8"))

    def _run(self, tree: Path, files: list[Path]) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            print(shlex.join([str(tree), folder, *map(str, files)]), file=self._server.stdin, flush=True)
            assert self._server.stdout is not None, "it is a pipe"
            self._server.stdout.readline()
            report, log = Path(folder, REPORT), Path(folder, LOG)
            if not report.is_file():
                said = [line for line in _read_lines(log) if line.strip()]
                return {f"pytest {' '.join(map(str, files))}": said[-1] if said else "ended"}
            return dict(map(_outcome, ElementTree.parse(report).iter("testcase")))


def find_tests(tree: Path, touched: Iterable[str]) -> list[Path]:
    """Returns the unit tests among `touched`, and those that are named after a touched module."""
    paths = [Path(path) for path in touched]
    found = {path for path in paths if path.is_relative_to(UNIT_TESTS) and path.name.startswith("test_")}
    for path in paths:
        if path.parts[0] == "src" and path.suffix == ".py":
            found |= {test.relative_to(tree) for test in (tree / UNIT_TESTS).rglob(f"test_{path.name}")}
    return sorted(path for path in found if (tree / path).is_file())


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for outcome, told in {"failure": "failed", "error": "error", "skipped": "skipped"}.items():
        if case.find(outcome) is not None:
            return f"{case.get('classname')}.{case.get('name')}", told
    return f"{case.get('classname')}.{case.get('name')}", "passed"


def _stand_in_for_transformer_engine(files: list[str]) -> None:
    """Lets Bridge import Transformer Engine where its module of LoRA layers, or a file of tests, can't do without.

    Megatron Core is imported first, so that it knows that there is none.
    """
    if not any(map(_imports_transformer_engine, ["src/megatron/bridge/peft/lora_layers.py", *files])):
        return
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    from torch import nn

    package = mock.MagicMock(__version__="0.0.0", __spec__=ModuleSpec("transformer_engine", None))
    package.pytorch.__spec__ = ModuleSpec("transformer_engine.pytorch", None)
    package.pytorch.Linear = nn.Linear
    sys.modules |= {"transformer_engine": package, "transformer_engine.pytorch": package.pytorch}


def _imports_transformer_engine(file: str) -> bool:
    imports = [node for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.Import)]
    return any(alias.name.startswith("transformer_engine") for node in imports for alias in node.names)


def _serve() -> None:
    """Run pytest for each line of stdin: a tree, a folder for what the run leaves, and the files."""
    for line in sys.stdin:
        tree, folder, *files = shlex.split(line)
        if not (child := os.fork()):
            os.setpgid(0, 0)
            os._exit(_run_pytest(Path(tree), Path(folder), files))
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started and not ended
        for name in _read_lines(Path(folder, LOADED)):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.freeze()
        print("done", flush=True)


def _run_pytest(tree: Path, folder: Path, files: list[str]) -> int:
    os.chdir(tree)
    output = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:1] = [str(tree / "src"), str(tree)]
    # Some tests start processes of their own, which import the package, or the test.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    import pytest

    _stand_in_for_transformer_engine(files)
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junit-xml={folder / REPORT}"]
    status = pytest.main([*options, *files])
    files_of = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    outside = [name for name, file in files_of.items() if file and not Path(file).is_relative_to(tree)]
    (folder / LOADED).write_text("\n".join(outside), "utf-8")
    return int(status)


def _read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


if __name__ == "__main__":
    _serve()
