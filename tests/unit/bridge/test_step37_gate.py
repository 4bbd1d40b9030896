# SPDX-License-Identifier: Apache-2.0
"""Step-3.7 has gates in its attention, by whatever Megatron Core has for them."""

from types import SimpleNamespace

import pytest

from megatron.bridge.models.stepfun import step37_bridge
from megatron.bridge.models.stepfun.configuration_step37 import Step37Config


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_gates_are_there_once(monkeypatch, gated, native):
    monkeypatch.setattr(step37_bridge, "_mcore_supports_head_wise_attn_gate", lambda: native)
    text = {"num_hidden_layers": 2, "moe_layers_enum": [1], "use_head_wise_attn_gate": gated}
    config = Step37Config(text_config=text)
    provider = step37_bridge.Step37Bridge().provider_bridge(SimpleNamespace(config=config))
    assert provider.head_wise_attn_gate == gated
    assert provider.attention_output_gate == (gated and not native)
