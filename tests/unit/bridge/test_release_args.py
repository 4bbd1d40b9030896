# SPDX-License-Identifier: Apache-2.0
"""The state of a release checkpoint: weights, and args that Megatron-LM builds the model from."""

import logging
from types import SimpleNamespace

import pytest
import torch.nn.functional as F

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.training.release_state import release_state_dict, writes_releases
from megatron.bridge.training.release_writer import ReleaseWriter


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


def test_padded_vocabulary_is_the_one_that_the_model_has():
    provider = make_provider(should_pad_vocab=True, make_vocab_size_divisible_by=128, tensor_model_parallel_size=2)
    assert megatron_lm_args(provider).padded_vocab_size == 512


def test_an_activation_without_a_flag_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        megatron_lm_args(make_provider(activation_func=F.gelu))
    assert "no flag for the activation gated gelu" in caplog.text


def test_a_release_holds_weights_and_args_only():
    state = {"model": {}, "optimizer": 1, "opt_param_scheduler": 1, "rng_state": 1, "iteration": 7}
    state = release_state_dict(state, SimpleNamespace(model=make_provider()))
    assert state.keys() == {"model", "args", "checkpoint_version", "iteration"}
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_save_checkpoint_gets_a_writer_that_discards_on_an_error(tmp_path, fails):
    @writes_releases(ReleaseWriter)
    def save_checkpoint(state, writer=None):
        if writer is not None:
            writer.stage()
            if fails:
                raise KeyboardInterrupt
            writer.publish()

    state = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path), async_save=False)))
    if fails:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(state, release=True)
    else:
        save_checkpoint(state)
        save_checkpoint(state, release=True)
    assert (tmp_path / "release").is_dir() is not fails
    assert not (tmp_path / "release.incomplete").exists()
