# SPDX-License-Identifier: Apache-2.0
"""transformers reads less, and knows the same."""

import importlib.metadata
import subprocess
import sys

import pytest

from megatron.bridge.utils.deferred_scans import Distributions


KNOWS = """
import sys
if sys.argv[1:]:
    from megatron.bridge.utils.deferred_scans import short_scans
    short_scans()
import transformers
from transformers.utils import import_utils
models = import_utils.define_import_structure(transformers.models.__file__)
found = {str(sorted(needs)): {name: sorted(names) for name, names in each.items()} for needs, each in models.items()}
print(sorted(found.items()), sorted(dir(transformers)))
print([import_utils._is_package_available(name, return_version=True) for name in ("torch", "PIL", "accelerate")])
"""


def test_transformers_has_the_same_names_and_versions():
    commands = ([sys.executable, "-W", "ignore", "-c", KNOWS, *given] for given in ([], ["short"]))
    plain, short = (subprocess.run(each, capture_output=True, text=True, timeout=120) for each in commands)
    assert plain.returncode == short.returncode == 0, short.stderr[-2000:]
    assert plain.stdout == short.stdout


@pytest.mark.parametrize("package", ["torch", "transformers", "PIL", "yaml"])
def test_a_package_has_the_distribution_that_importlib_finds(package):
    assert set(Distributions()[package]) <= set(importlib.metadata.packages_distributions()[package])


def test_a_package_that_is_not_installed_has_none():
    assert Distributions().get("no_such_package", []) == []
