# SPDX-License-Identifier: Apache-2.0
"""The functional tests' own modules are scripts beside each other, and import each other so."""

import sys
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "functional"))

# Goes when `junitparser` is in the dependency groups `unit` and `functional`.
collect_ignore = [] if find_spec("junitparser") else ["test_report.py"]
