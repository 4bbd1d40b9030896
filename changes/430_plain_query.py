# SPDX-License-Identifier: Apache-2.0
"""A DeepSeek-V2-Lite converts: latent attention without a compressed query."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, add_import, ifs, insert_before


change = Change(
    name="plain-query",
    message="""\
fix(model): build latent attention without a norm for a plain query

With qk_layernorm and no q_lora_rank, Megatron Core 0.19 puts a norm in front
of the query. DeepSeek-V2-Lite and Sarvam have none there: a conversion left
it at its initial value, and trained another model.

Build such a query without a norm.
""",
    why="A model with q_lora_rank null, such as DeepSeek-V2-Lite, converts to the model that it is.",
    edits=[
        File(
            "models/gpt_provider.py",
            [
                add_import("from megatron.bridge.models.plain_query import with_plain_query", releases=">=0.6"),
                insert_before(
                    "GPTModelProvider.provide",
                    m.Assert(test=m.Comparison(left=m.Attribute(value=m.Name("self"), attr=m.Name("vocab_size")))),
                    "transformer_layer_spec = with_plain_query(transformer_layer_spec, self)",
                    releases=">=0.6",
                ),
                insert_before(
                    "mtp_block_spec",
                    ifs('hasattr(spec, "layer_specs") and len(spec.layer_specs) == 0'),
                    "spec = with_plain_query(spec, config)",
                    releases=">=0.6",
                ),
            ],
        )
    ],
    modules=["models/plain_query.py"],
    problem=(
        "With Megatron Core 0.19, `AutoBridge.import_ckpt` of DeepSeek-V2-Lite makes a model with a norm in front of "
        "every query, which the checkpoint doesn't have. The norm keeps its initial values, so the model computes "
        "something else."
    ),
    changes=[
        "Latent attention with `q_lora_rank` None has no norm in front of the query, as before Megatron Core 0.19."
    ],
    unchanged=["Models with a compressed query."],
    tested=[
        "Logits of a tiny DeepSeek-V2-Lite beside those of transformers, on the CPU; import and export bit for bit."
    ],
    tests={"tests/unit/bridge/test_plain_query.py": "models/"},
    stands_on=["local-layers", "launch-flags"],
)
