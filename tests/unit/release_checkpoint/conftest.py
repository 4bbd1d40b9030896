# SPDX-License-Identifier: Apache-2.0
"""Lets these tests use the helpers of those that travel upstream."""

import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "bridge"))


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take a name on the hub for a model that is in the cache."""
    monkeypatch.setattr("megatron.bridge.utils.hub.download", lambda name, *_: tmp_path / "cache" / name)
