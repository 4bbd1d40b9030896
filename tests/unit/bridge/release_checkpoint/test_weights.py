# SPDX-License-Identifier: Apache-2.0
"""Args are compared with the shapes of the weights, in the layouts that Megatron Core writes."""

from argparse import Namespace

import pytest

from megatron.bridge.release_checkpoint.metadata import Metadata
from megatron.bridge.release_checkpoint.weights import contradictions, count_parameters, dtypes


DENSE = {
    "embedding.word_embeddings.weight": (384, 64),
    "decoder.layers.self_attention.linear_qkv.weight": (4, 128, 64),
    "decoder.layers.self_attention.linear_proj.weight": (4, 64, 64),
    "decoder.layers.mlp.linear_fc1.weight": (4, 256, 64),
    "decoder.layers.mlp.linear_fc2.weight": (4, 64, 128),
}
DENSE_ARGS = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "padded_vocab_size": 384,
    "swiglu": True,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "multi_latent_attention": False,
}
EXPERTS = {
    "decoder.layers.mlp.router.weight": (4, 8, 64),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (4, 8, 64, 64),
}
MOE = {name: shape for name, shape in DENSE.items() if "mlp.linear" not in name} | EXPERTS
MOE_ARGS = DENSE_ARGS | {"num_experts": 8, "moe_ffn_hidden_size": 32}
APART = {
    name.replace("layers", f"layers.{layer}"): shape[1:] if "layers" in name else shape
    for name, shape in DENSE.items()
    for layer in range(4)
}
MIXED = {
    **{name: shape for name, shape in APART.items() if "layers.3.mlp" not in name},
    **{name.replace("layers", "layers.3"): shape[1:] for name, shape in EXPERTS.items()},
}
LAYOUTS = {
    "dense": (DENSE, DENSE_ARGS),
    "tied": (DENSE, DENSE_ARGS),
    "layer by layer": (APART, DENSE_ARGS),
    "prefixed": ({f"model.{name}": shape for name, shape in DENSE.items()}, DENSE_ARGS),
    "no gate": (DENSE, DENSE_ARGS | {"swiglu": False, "ffn_hidden_size": 256}),
    "a gate that Megatron-LM has no flag for": (DENSE, DENSE_ARGS | {"swiglu": False}),
    "gated attention": (
        DENSE | {"decoder.layers.self_attention.linear_qkv.weight": (4, 192, 64)},
        DENSE_ARGS,
    ),
    "every head a group": (
        DENSE | {"decoder.layers.self_attention.linear_qkv.weight": (4, 192, 64)},
        DENSE_ARGS | {"group_query_attention": False, "num_query_groups": 1},
    ),
    "experts": (MOE, MOE_ARGS),
    "experts in some layers": (MIXED, MOE_ARGS),
    "latent attention": (
        {name: shape for name, shape in DENSE.items() if "qkv" not in name}
        | {"decoder.layers.self_attention.linear_q_up_proj.weight": (4, 96, 24)},
        DENSE_ARGS | {"multi_latent_attention": True},
    ),
    "optimizer state": (DENSE | {"optimizer.state.exp_avg.decoder.layers.9.mlp.linear_fc1.weight": (1,)}, DENSE_ARGS),
    "multi-token prediction": (DENSE | {"mtp.layers.0.transformer_layer.mlp.linear_fc1.weight": (99, 64)}, DENSE_ARGS),
}
# Each contradicts the weights: of these layouts, or of all.
OTHER = [
    ("num_layers", 5, LAYOUTS),
    ("hidden_size", 65, LAYOUTS),
    ("padded_vocab_size", 512, LAYOUTS),
    ("ffn_hidden_size", 100, set(LAYOUTS) - {"experts"}),
    ("num_query_groups", 4, set(LAYOUTS) - {"latent attention", "every head a group", "gated attention"}),
    ("num_attention_heads", 8, set(LAYOUTS) - {"latent attention", "gated attention"}),
    ("num_experts", 16, LAYOUTS),
    ("num_experts", None, {"experts", "experts in some layers"}),
    ("moe_ffn_hidden_size", 64, {"experts", "experts in some layers"}),
]


def metadata_of(shapes: dict[str, tuple[int, ...]]) -> Metadata:
    return Metadata({name: (shape, "bfloat16") for name, shape in shapes.items()}, (), ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_args_are_compared_with_the_weights(layout: str):
    shapes, args = LAYOUTS[layout]
    assert contradictions(Namespace(**args), metadata_of(shapes)) == []
    for name, value, layouts in OTHER:
        if layout in layouts:
            (said,) = contradictions(Namespace(**args | {name: value}), metadata_of(shapes))
            if "linear_qkv" not in said:
                assert said.startswith(f"{name} is {value or 0} by the args and "), (name, said)
    # Of what is not there nothing is said.
    for name in args:
        assert contradictions(Namespace(**{k: v for k, v in args.items() if k != name}), metadata_of(shapes)) == []


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "spec", "heterogeneous_layers_config_path"])
def test_nothing_is_said_of_models_that_count_layers_otherwise(name: str):
    args = Namespace(**DENSE_ARGS | {"num_layers": 8, name: "M*M*"})
    assert contradictions(args, metadata_of(DENSE)) == []


def test_the_state_of_a_training_is_no_weight():
    shapes, _ = LAYOUTS["optimizer state"]
    assert count_parameters(metadata_of(shapes)) == count_parameters(metadata_of(DENSE))
    assert dtypes(metadata_of(shapes)) == ["bfloat16"]
