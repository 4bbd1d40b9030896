# SPDX-License-Identifier: Apache-2.0
"""The functional tests' own modules are scripts beside each other, and import each other so."""

import sys
from pathlib import Path

import hypothesis


sys.path.insert(0, str(Path(__file__).parents[2] / "functional"))
# The same inputs in each run, and no limit of time.
hypothesis.settings.load_profile("ci")
