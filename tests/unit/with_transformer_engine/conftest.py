# SPDX-License-Identifier: Apache-2.0
"""Lets the tests import what the session families runs."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "with_transformer_engine"))
