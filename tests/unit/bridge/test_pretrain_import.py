# SPDX-License-Identifier: Apache-2.0
"""pretrain is imported where nvidia-resiliency-ext, which it needs for an annotation only, is not installed."""

import importlib.util
import sys

import pytest


# What else of the training loop asks for the newest Megatron Core.
pytest.importorskip("megatron.bridge.training.utils.flop_utils", exc_type=ImportError)


def test_pretrain_is_imported_without_resiliency_ext(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.inprocess", None)
    from megatron.bridge.training import pretrain

    spec = importlib.util.spec_from_file_location("pretrain_again", pretrain.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.CallWrapper is object
    assert callable(module.pretrain)
