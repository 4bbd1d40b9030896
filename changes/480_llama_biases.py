# SPDX-License-Identifier: Apache-2.0
"""A Llama whose linear layers all have biases converts with them."""

from fork.change import Change
from fork.edits import File, assign, insert_after


BIASES = """\
attention, mlp = "model.layers.*.self_attn.{}_proj.bias", "model.layers.*.mlp.{}_proj.bias"
into = "decoder.layers.*.{}.bias"
mapping_list += [
    QKVMapping(into.format("self_attention.linear_qkv"), **{each: attention.format(each) for each in "qkv"}),
    AutoMapping(into.format("self_attention.linear_proj"), attention.format("o")),
    GatedMLPMapping(into.format("mlp.linear_fc1"), **{each: mlp.format(each) for each in ("gate", "up")}),
    AutoMapping(into.format("mlp.linear_fc2"), mlp.format("down")),
]
"""

change = Change(
    name="llama-biases",
    message="""\
feat(model): convert the biases of Llama

The provider of a Llama with attention_bias and mlp_bias has biases, and the
bridge had no mappings for them.

Map them. Megatron Core has one switch for the biases of all linear layers, so
a Llama with only one of the two is another model.
""",
    why="A Llama with attention_bias and mlp_bias converts.",
    edits=[
        File(
            "models/llama/llama_bridge.py",
            [insert_after("LlamaBridge.mapping_registry", assign("mapping_list"), BIASES)],
        )
    ],
    problem="`AutoBridge.import_ckpt` of a Llama with `attention_bias` and `mlp_bias` has no source for the biases.",
    changes=["LlamaBridge maps the biases of the attention and of the MLP."],
    unchanged=["Models without biases."],
    tested=["Megatron-LM's logits beside transformers' on a tiny model with random biases, on the CPU, within 1e-4."],
    tests={"tests/unit/bridge/test_llama_biases.py": "models/llama/"},
    stands_on=["config-check"],
)
