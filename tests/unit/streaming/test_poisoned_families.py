# SPDX-License-Identifier: Apache-2.0
"""No entry of a checkpoint is memory that was merely allocated, in the families that aren't among the tiny models."""

import pytest
from random_models import FURTHER, MTP, save_random_model
from test_accounting import import_into_nan
from tiny_models import FAMILIES


@pytest.mark.parametrize("family", [*FURTHER, MTP])
def test_no_entry_is_merely_allocated(tmp_path, monkeypatch, family):
    if family in FURTHER:
        monkeypatch.setitem(FAMILIES, family, FURTHER[family])
    assert import_into_nan(monkeypatch, save_random_model(tmp_path / "hf", family)) == []
