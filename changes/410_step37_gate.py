# SPDX-License-Identifier: Apache-2.0
"""Step-3.7 has the gates of its attention, with a Megatron Core that has no gate for each head."""

from fork.change import Change
from fork.edits import File, add_import, assign, insert_after


change = Change(
    name="step37-gate",
    message="""\
fix(model): build the attention gates of Step-3.7

Step-3.5 falls back to attention_output_gate where Megatron Core has no gate
for each head. Step-3.7 didn't: its model had no gates, and a conversion
stopped at the shape of linear_qkv.

Set `attention_output_gate` for Step-3.7, too.
""",
    why="Step-3.7 converts with Megatron Core 0.19.",
    edits=[
        File(
            "models/stepfun/step37_bridge.py",
            [
                add_import(
                    "from megatron.bridge.models.stepfun.step35_bridge import _mcore_supports_head_wise_attn_gate",
                    releases=">=0.6",
                ),
                insert_after(
                    "Step37Bridge.provider_bridge",
                    assign("provider.head_wise_attn_gate"),
                    "provider.attention_output_gate = head_wise_attn_gate and not _mcore_supports_head_wise_attn_gate()",
                    releases=">=0.6",
                ),
            ],
        )
    ],
    problem="`AutoBridge.import_ckpt` of Step-3.7 with Megatron Core 0.19 stops at the shape of `linear_qkv`.",
    changes=["Step-3.7 sets `attention_output_gate` as Step-3.5 does, where Megatron Core has no head-wise gate."],
    unchanged=["A Megatron Core with `head_wise_attn_gate`."],
    tested=["Import and export of a tiny model, bit for bit."],
    tests={"tests/unit/bridge/test_step37_gate.py": "models/stepfun/"},
)
