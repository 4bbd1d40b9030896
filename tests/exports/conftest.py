# SPDX-License-Identifier: Apache-2.0
"""Lets these tests use the steps and models of the functional tests."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "functional"))
