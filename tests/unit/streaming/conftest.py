# SPDX-License-Identifier: Apache-2.0
"""Lets these tests use the helpers of those that travel upstream."""

import sys
from pathlib import Path

import hypothesis


sys.path.append(str(Path(__file__).parents[1] / "bridge"))
# The same inputs in each run, and no limit of time.
hypothesis.settings.load_profile("ci")
