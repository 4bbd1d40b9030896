# SPDX-License-Identifier: Apache-2.0
"""Any module of Bridge can be the first that a process imports."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["data.loaders", "models.hf_pretrained", "training.config", "training.checkpointing"]
)
def test_any_module_can_be_the_first_that_is_imported(module: str):
    command = [sys.executable, "-W", "ignore", "-c", f"import megatron.bridge.{module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
