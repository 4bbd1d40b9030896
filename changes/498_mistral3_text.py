# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 has the text model that its config says: Mistral's, as in Mistral Small 3.1, or Ministral 3's."""

from fork.change import Change
from fork.edits import File, assign, expression, insert_after, replace


ROPE = """\
provider.layernorm_epsilon = text_config.rms_norm_eps
rope = text_config.rope_parameters
kind = rope.get("rope_type", "default")
if kind == "default":
    provider.position_embedding_type = "rope"
elif kind == "yarn":
    provider.yarn_rotary_scaling_factor = rope["factor"]
    provider.yarn_original_max_position_embeddings = rope["original_max_position_embeddings"]
    provider.yarn_beta_fast, provider.yarn_beta_slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    provider.yarn_mscale, provider.yarn_mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    provider.yarn_correction_range_round_to_int = rope.get("truncate", True)  # transformers' default
else:
    raise ValueError(f"rope_type is {kind!r}, expected 'default' or 'yarn': Mistral 3 has no other positions here")
"""
STORED = "self.config.hf_config.text_config.rope_parameters"

change = Change(
    name="mistral3-text",
    message="""\
fix(model): follow the positions of Mistral 3's text model

The bridge built every Mistral 3 with the YaRN of Ministral 3, whatever its
config says, and asked for llama_4_scaling_beta, which Mistral Small 3.1
doesn't have: a KeyError. Of Ministral 3 itself, it left out that YaRN rounds
its range of corrections to whole dimensions, unless truncate is false.

Follow the config for both text models.
""",
    why="Mistral Small 3.1 converts, and a Mistral 3 with other positions is the model that its config says.",
    edits=[
        File(
            "models/ministral3/ministral3_bridge.py",
            [insert_after("Ministral3Bridge.provider_bridge", assign("provider"), ROPE, releases=">=0.6")],
        ),
        File(
            "models/ministral3/ministral3_provider.py",
            [
                replace(
                    "MinistralTEDotProductAttention.__init__",
                    expression(f'{STORED}["llama_4_scaling_beta"]'),
                    f'{STORED}.get("llama_4_scaling_beta") or 0',
                    releases=">=0.6",
                ),
                replace(
                    "MinistralTEDotProductAttention.__init__",
                    expression(f'{STORED}["original_max_position_embeddings"]'),
                    f'{STORED}.get("original_max_position_embeddings", self.config.seq_length)',
                    releases=">=0.6",
                ),
            ],
        ),
    ],
    problem="`AutoBridge.import_ckpt` of Mistral Small 3.1 ends with `KeyError: 'llama_4_scaling_beta'`.",
    changes=[
        "A text model with default positions has no YaRN and no scaling of queries.",
        "YaRN has the factor, length, betas, scales and truncate of the config, and the norms have its epsilon.",
    ],
    unchanged=["The weights of Ministral 3, and its positions apart from the rounding."],
    tested=["Import, export and logits of tiny models with both text models, on the CPU."],
    tests={"tests/unit/bridge/test_mistral3_text.py": "models/"},
)
