# SPDX-License-Identifier: Apache-2.0
"""A Llama whose linear layers all have biases converts with them."""

from fork.change import Change
from fork.edits import File, assign, insert_after


BIASES = """\
mapping_list.extend(
    [
        QKVMapping(
            megatron_param="decoder.layers.*.self_attention.linear_qkv.bias",
            q="model.layers.*.self_attn.q_proj.bias",
            k="model.layers.*.self_attn.k_proj.bias",
            v="model.layers.*.self_attn.v_proj.bias",
        ),
        AutoMapping("decoder.layers.*.self_attention.linear_proj.bias", "model.layers.*.self_attn.o_proj.bias"),
        GatedMLPMapping(
            megatron_param="decoder.layers.*.mlp.linear_fc1.bias",
            gate="model.layers.*.mlp.gate_proj.bias",
            up="model.layers.*.mlp.up_proj.bias",
        ),
        AutoMapping("decoder.layers.*.mlp.linear_fc2.bias", "model.layers.*.mlp.down_proj.bias"),
    ]
)
"""

change = Change(
    name="llama-biases",
    message="""\
feat(model): convert the biases of Llama

The provider of a Llama with attention_bias and mlp_bias has biases, and the
bridge had no mappings for them. Map them. Megatron Core has one switch for
the biases of all linear layers, so a Llama with only one of the two is
another model.
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
