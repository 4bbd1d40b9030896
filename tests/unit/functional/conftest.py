# SPDX-License-Identifier: Apache-2.0
"""The functional tests' own modules are scripts beside each other, and import each other so."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "functional"))
