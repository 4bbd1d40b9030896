# SPDX-License-Identifier: Apache-2.0
"""The state of a release checkpoint: weights, and args that Megatron-LM builds the model from."""

from types import SimpleNamespace

import torch.nn.functional as F

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.training.release_state import release_state_dict


def make_provider(**changes):
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 300}
    llama = {"gated_linear_unit": True, "activation_func": F.silu, "normalization": "RMSNorm"}
    return GPTModelProvider(**sizes | llama | changes)


def test_the_args_describe_the_model():
    args = megatron_lm_args(make_provider(rotary_base=500000.0))
    assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (2, 64, 4)
    assert args.group_query_attention and args.num_query_groups == 2
    assert args.swiglu and args.normalization == "RMSNorm"
    assert args.rotary_base == 500000 and isinstance(args.rotary_base, int)
    assert args.no_save_optim and args.no_save_rng and args.consumed_train_samples == 0
    assert {"tokenizer_type", "tokenizer_model", "moe_grouped_gemm"}.isdisjoint(vars(args))


def test_a_release_holds_weights_and_args_only():
    state = {"model": {}, "optimizer": 1, "opt_param_scheduler": 1, "rng_state": 1, "iteration": 7}
    state = release_state_dict(state, SimpleNamespace(model=make_provider()))
    assert state.keys() == {"model", "args", "checkpoint_version", "iteration"}
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
