# SPDX-License-Identifier: Apache-2.0
"""Upstream's unit tests of what a commit touches, compared with what they did before the stack.

Run as a script, it runs pytest in a checkout on a host without a GPU and without Transformer Engine.
"""

import ast
import importlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock


UNIT_TESTS = Path("tests", "unit_tests")


class Comparison:
    """Compares the outcomes of tests after each commit with those before the first.

    Args:
        python: the interpreter of an environment that has what Megatron-Bridge and its tests import.
        before: a checkout as it was before the first commit.
    """

    def __init__(self, python: Path, before: Path):
        self.python, self.before = python, before
        self.files: set[Path] = set()
        self.outcomes: dict[str, str] = {}

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
        return worse + [f"{test}: not run, was {self.outcomes[test]}" for test in lost]

    def _among(self, modules: tuple[str, ...]) -> dict[str, str]:
        """The outcomes before the first commit of the tests in `modules`, each of which ends in a dot."""
        return {test: outcome for test, outcome in self.outcomes.items() if test.startswith(modules)}

    def _outcomes(self, tree: Path, files: list[Path]) -> dict[str, str]:
        """The outcome of each test by its name."""
        if not files:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junit-xml={report}"]
            environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "CUDA_VISIBLE_DEVICES": ""}
            command = [str(self.python), __file__, *options, *map(str, files)]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if not report.is_file():
                return {f"pytest {' '.join(map(str, files))}": (done.stdout + done.stderr).strip().splitlines()[-1]}
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


def _stand_in_for_transformer_engine() -> None:
    """Lets Bridge import Transformer Engine where its module of LoRA layers can't do without.

    Megatron Core is imported first, so that it knows that there is none.
    """
    source = Path("src", "megatron", "bridge", "peft", "lora_layers.py").read_text("utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import)]
    if not any(alias.name.startswith("transformer_engine") for node in imports for alias in node.names):
        return
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    from torch import nn

    package = mock.MagicMock(__version__="0.0.0", __spec__=ModuleSpec("transformer_engine", None))
    package.pytorch.__spec__ = ModuleSpec("transformer_engine.pytorch", None)
    package.pytorch.Linear = nn.Linear
    sys.modules |= {"transformer_engine": package, "transformer_engine.pytorch": package.pytorch}


if __name__ == "__main__":
    import pytest

    sys.path[0] = os.getcwd()
    _stand_in_for_transformer_engine()
    sys.exit(pytest.main(sys.argv[1:]))
