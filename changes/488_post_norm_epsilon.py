# SPDX-License-Identifier: Apache-2.0
"""Norms behind attention and MLP have the epsilon of the config."""

from fork.change import Change
from fork.edits import File, call, expression, pass_argument, replace


PLACE = "self.layer_number % 2"
# Where Bridge 0.3 to 0.5 has windows, and how long they are, which upstream has mended since.
WINDOWS = (
    ("gemma2_provider", "Gemma2DotProductAttention.__init__", f"{PLACE} == 0", f"{PLACE} == 1", "<0.6"),
    (
        "gemma2_bridge",
        "Gemma2Bridge.provider_bridge",
        "(hf_config.sliding_window, 0)",
        "(hf_config.sliding_window - 1, 0)",
        "<0.4",
    ),
    (
        "gemma3_provider",
        "Gemma3TEDotProductAttention.__init__",
        "(config.window_size, 0)",
        "(config.window_size - 1, 0)",
        "<0.4",
    ),
)

change = Change(
    name="post-norm-epsilon",
    message="""\
fix(model): give the norms behind a layer's outputs their epsilon

Gemma 2 and 3 and EXAONE 4 have norms behind attention and MLP. Bridge built
them with the default of Transformer Engine, 1e-5. Gemma's is 1e-6.
""",
    why="Gemma 2 and 3 and EXAONE 4 compute with the epsilon of their config in every norm.",
    edits=[
        *(
            File(
                f"models/{file}.py",
                [
                    pass_argument(
                        "TERowParallelLinearLayerNorm.__init__",
                        call("TENorm"),
                        "eps=config.layernorm_epsilon",
                        releases=releases,
                    )
                ],
            )
            for file, releases in (
                ("common/te_layers", ">=0.6"),
                ("gemma/gemma2_provider", "<0.6"),
                ("gemma/gemma3_provider", "<0.6"),
            )
        ),
        *(
            File(f"models/gemma/{file}.py", [replace(scope, expression(before), after, releases=releases)])
            for file, scope, before, after, releases in WINDOWS
        ),
    ],
    problem="`AutoBridge.import_ckpt` of Gemma 2 makes a model whose logits differ from transformers' by 9e-05 of the "
    "largest one, and by 9e-03 if `rms_norm_eps` is 1e-3. EXAONE 4 then differs by 0.8.",
    changes=["`TERowParallelLinearLayerNorm` passes `layernorm_epsilon` to its norm."],
    unchanged=["Checkpoints: a norm's epsilon is in none."],
    tested=["Logits of tiny models of all these families with an epsilon of 1e-3, on the CPU: within 1e-05."],
    tests={"tests/unit/bridge/test_post_norm_epsilon.py": "models/"},
)
