# SPDX-License-Identifier: Apache-2.0
"""Lets these tests use the helpers of those that travel upstream."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "bridge"))
