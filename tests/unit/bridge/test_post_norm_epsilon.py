# SPDX-License-Identifier: Apache-2.0
"""A norm behind an output has the epsilon of the config."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine

from megatron.bridge.models.common import te_layers


class _Linear(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def test_norm_has_the_epsilon_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may have no Transformer Engine, so a copy of the module has layers of the test's own."""
    monkeypatch.setattr(transformer_engine, "TERowParallelLinear", _Linear)
    monkeypatch.setattr(transformer_engine, "TENorm", lambda config, size, eps=1e-5: torch.nn.RMSNorm(size, eps))
    spec = importlib.util.spec_from_file_location("te_layers_copy", te_layers.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    made = copy.TERowParallelLinearLayerNorm(8, 16, config=SimpleNamespace(layernorm_epsilon=1e-6))
    assert made.post_layernorm.eps == 1e-6
