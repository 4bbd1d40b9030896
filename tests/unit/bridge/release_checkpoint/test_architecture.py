# SPDX-License-Identifier: Apache-2.0
"""Args that spell one model in several ways say the same."""

from argparse import Namespace

import pytest

from megatron.bridge.release_checkpoint.architecture import differ, facts


DENSE = {"num_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "kv_channels": 16}
ROPE = DENSE | {"rotary_base": 10000, "position_embedding_type": "rope"}
YARN = ROPE | {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}
WINDOW = DENSE | {"window_size": [7, 0]}
EXPERTS = DENSE | {"num_experts": 4}
SAME = [
    (DENSE | {"num_query_groups": 1, "group_query_attention": False}, DENSE | {"num_query_groups": 4}),
    (DENSE | {"kv_channels": None}, DENSE),
    (DENSE | {"window_size": None}, DENSE | {"window_size": None, "window_attn_skip_freq": [1, 0]}),
    (WINDOW | {"window_size": (7, 0), "window_attn_skip_freq": 2}, WINDOW | {"window_attn_skip_freq": [1, 0]}),
    (EXPERTS | {"moe_layer_freq": 2}, EXPERTS | {"moe_layer_freq": [1, 0]}),
    (EXPERTS | {"moe_router_num_groups": None}, EXPERTS | {"moe_router_num_groups": 1, "moe_router_group_topk": 1}),
    (EXPERTS | {"moe_layer_freq": 1, "ffn_hidden_size": 8}, EXPERTS | {"moe_layer_freq": 1, "ffn_hidden_size": 9}),
    (DENSE | {"add_bias_linear": True, "add_qkv_bias": True}, DENSE | {"add_bias_linear": True}),
    (DENSE | {"mtp_use_repeated_layer": None}, DENSE | {"mtp_use_repeated_layer": False}),
    (DENSE | {"norm_epsilon": 1e-6}, DENSE | {"layernorm_epsilon": 1e-6}),
    (ROPE | {"rotary_percent": None}, ROPE | {"rotary_base": 10000.0, "rotary_percent": 1.0}),
    (ROPE | {"use_rope_scaling": True}, ROPE | {"use_rope_scaling": True, "rope_scaling_factor": 8.0}),
    (ROPE | {"rotary_seq_len_interpolation_factor": 1}, ROPE),
    (YARN | {"rotary_scaling_factor": 1.0}, ROPE),
    (YARN, YARN | {"mscale": 1.0, "mscale_all_dim": 0.0, "yarn_beta_fast": 32.0}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_one_model(one: dict, other: dict) -> None:
    left, right = facts(Namespace(**one)), facts(Namespace(**other))
    assert left.keys() == right.keys()
    assert not [name for name in left if differ(left[name], right[name])]
