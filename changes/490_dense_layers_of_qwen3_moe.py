# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-MoE with dense layers between those with experts converts."""

from fork.change import Change
from fork.edits import File, assign, insert_after


LAYERS = """\
# As `Qwen3MoeDecoderLayer` of transformers decides.
config = hf_pretrained.config
dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
if dense or step != 1:
    from functools import partial

    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=HAVE_TE)
    provider.moe_layer_freq = [
        int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)
    ]
"""

DENSE = """\
mapping_list.extend(
    [
        AutoMapping(
            "decoder.layers.*.mlp.linear_fc1.layer_norm_weight", "model.layers.*.post_attention_layernorm.weight"
        ),
        GatedMLPMapping(
            megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
            gate="model.layers.*.mlp.gate_proj.weight",
            up="model.layers.*.mlp.up_proj.weight",
        ),
        AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight"),
    ]
)
"""

change = Change(
    name="dense-layers-of-qwen3-moe",
    message="""\
feat(model): convert Qwen3-MoE with dense layers

decoder_sparse_step and mlp_only_layers make some layers dense, which the
bridge left out: all layers had experts, some of them without a source.

Set moe_layer_freq, and map the dense layers.
""",
    why="A Qwen3-MoE with decoder_sparse_step or mlp_only_layers converts.",
    edits=[
        File(
            "models/qwen/qwen3_moe_bridge.py",
            [
                insert_after("Qwen3MoEBridge.provider_bridge", assign("provider.moe_permute_fusion"), LAYERS),
                insert_after("Qwen3MoEBridge.mapping_registry", assign("mapping_list"), DENSE),
            ],
        )
    ],
    problem="`AutoBridge.import_ckpt` of a Qwen3-MoE with `decoder_sparse_step` 2 has no source for half of its layers.",
    changes=["Qwen3MoEBridge converts dense layers, as `decoder_sparse_step` and `mlp_only_layers` say."],
    unchanged=["Models whose layers all have experts."],
    tested=["Megatron-LM's logits beside transformers' on tiny models, on the CPU, within 1e-4."],
    tests={"tests/unit/bridge/test_dense_layers_of_qwen3_moe.py": "models/qwen/"},
    stands_on=["config-check"],
)
