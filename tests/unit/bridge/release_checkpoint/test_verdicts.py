# SPDX-License-Identifier: Apache-2.0
"""Each series of Megatron-LM is judged by its own rules."""

from pathlib import Path

import pytest

from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.verdicts import grouped, launch_flags, verdicts


# name: args beside those of the small model, verdicts from core 0.12 to 0.19, and what one of them says
MODELS = {
    "dense": ({}, "yyyyyyyy", ""),
    "windows": ({"window_size": [127, 0]}, "nnnyyyyy", "has no --window-size, which this model needs"),
    "no windows": ({"window_size": None}, "yyyyyyyy", ""),
    "latent attention": ({"multi_latent_attention": True, "rope_type": "rope"}, "nnyyyyyy", "has no --rope-type"),
    "latent attention, yarn": ({"multi_latent_attention": True, "rope_type": "yarn"}, "yyyyyyyy", ""),
    "softmax router": ({"num_experts": 4, "moe_router_score_function": "softmax"}, "yyyyyyyy", ""),
    "sigmoid router": (
        {"num_experts": 4, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        "ppppyyyy",
        "give --moe-router-score-function sigmoid --moe-router-enable-expert-bias as well",
    ),
    "dense, with a router's args": ({"moe_router_score_function": "sigmoid"}, "yyyyyyyy", ""),
    "multi-token prediction": ({"mtp_num_layers": 1}, "pppppyyy", "give --mtp-num-layers 1 as well"),
    "latent experts": ({"num_experts": 4, "moe_latent_size": 8}, "nnnnyyyy", "has no --moe-latent-size"),
    "sinks": ({"softmax_type": "learnable"}, "nnnyyyyy", "has no --softmax-type"),
    "yarn": ({"yarn_beta_fast": 32.0}, "nnnnnnny", "has no --yarn-beta-fast"),
    "hybrid": ({"hybrid_layer_pattern": "M*M*"}, "nnnnnyyy", "has no --hybrid-layer-pattern"),
    "some layers without positions": ({"no_rope_freq": [0, 1]}, "nyyyyyyy", "has no --no-rope-freq"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_series_that_lacks_what_a_model_needs(model: str, build, tmp_path: Path):
    args, loads, why = MODELS[model]
    root = build(tmp_path / "c", other_args=args)
    found = examine(root)
    found.payload.metadata.tensors["decoder.layers.mlp.router.weight"] = (
        (2, args.get("num_experts", 0), 8),
        "float32",
    )
    judged = verdicts(found)[:8]
    assert "".join(each.loads[0] for each in judged) == loads
    assert all(why in each.why for each in judged if each.loads != "yes")


def test_series_that_are_judged_alike_are_one(build, tmp_path: Path):
    found = examine(build(tmp_path / "c", common_pt=False))
    assert [(each.reader, each.loads) for each in grouped(verdicts(found))] == [
        ("Megatron-LM, core 0.12 to 0.18", "no"),
        ("Megatron-LM, core 0.19", "yes"),
        ("Megatron-Bridge", "yes"),
    ]
    assert launch_flags(found)["use_checkpoint_args"][:2] == ["--load", str(found.root)]
