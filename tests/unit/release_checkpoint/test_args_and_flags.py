# SPDX-License-Identifier: Apache-2.0
"""The args and flags of a checkpoint, judged by Megatron-LM's own parser and loader."""

import dataclasses
import io
import logging
import shlex

import pytest
import torch
import torch.nn.functional as F
from test_release_args import make_provider
from tiny_models import FAMILIES, hf_config

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.architecture import differ, facts, unknown
from megatron.bridge.release_checkpoint.args import megatron_lm_args
from megatron.bridge.release_checkpoint.flags import megatron_lm_flags


mlm_arguments = pytest.importorskip("megatron.training.arguments", reason="megatron-core ships it since 0.17")
mlm_checkpointing = pytest.importorskip("megatron.training.checkpointing")

# What the host or the training run decides, not the model.
NOT_ARCHITECTURE = {
    "autocast_dtype",
    "batch_p2p_comm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cp_comm_type",
    "cross_entropy_fusion_impl",
    "cross_entropy_loss_fusion",
    "deallocate_pipeline_outputs",
    "embedding_init_method",
    "expert_tensor_parallel_num_weight_shards",
    "gradient_accumulation_fusion",
    "inference_sampling_seed",
    "init_method",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "moe_token_dispatcher_type",
    "output_layer_init_method",
    "apply_rope_fusion",
    "persist_layer_norm",
    "pipeline_dtype",
    "tensor_parallel_num_weight_shards",
    "transformer_impl",
    "use_cpu_initialization",
}
RUN = shlex.split(
    "--micro-batch-size 1 --train-iters 1 --lr 0 --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-rope-fusion --tokenizer-type NullTokenizer --vocab-size 383"
)


@pytest.fixture(params=FAMILIES)
def provider(request):
    provider = AutoBridge.from_hf_config(hf_config(request.param)).to_megatron_provider(load_weights=False)
    provider.finalize()
    return provider


def parse(words, monkeypatch, checkpoint_args=None):
    """The args that Megatron-LM ends up with for a command line, and for a checkpoint that it is told to use."""
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *words, *RUN])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = mlm_arguments.parse_args()
    if checkpoint_args is not None:
        state_dict = {"args": checkpoint_args, "checkpoint_version": 3.0, "iteration": 0}
        found = (state_dict, "release", True, None)
        monkeypatch.setattr(mlm_checkpointing, "_load_base_checkpoint", lambda *_, **__: found)
        args.load = "a checkpoint"
        args, _ = mlm_checkpointing.load_args_from_checkpoint(args)
        args.load = None
    mlm_arguments.validate_args(args)
    return args


def differences(args, provider):
    config = mlm_arguments.core_transformer_config_from_args(args)
    return {
        field.name: (getattr(config, field.name), getattr(provider, field.name))
        for field in dataclasses.fields(config)
        if field.name not in NOT_ARCHITECTURE
        and hasattr(provider, field.name)
        and plain(getattr(config, field.name)) != plain(getattr(provider, field.name))
    }


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def assert_same_model(args, provider):
    assert differences(args, provider) == {}
    assert args.padded_vocab_size == provider.vocab_size
    assert args.untie_embeddings_and_output_weights is not provider.share_embeddings_and_output_weights
    assert args.position_embedding_type == provider.position_embedding_type
    assert (args.rotary_base, args.rotary_percent) == (provider.rotary_base, provider.rotary_percent)
    assert args.use_rope_scaling is provider.rope_scaling
    if provider.rope_scaling:
        assert args.rope_scaling_factor == provider.rope_scaling_factor
    assert args.max_position_embeddings == provider.seq_length


def test_the_flags_build_the_model(provider, monkeypatch):
    assert_same_model(parse(megatron_lm_flags(megatron_lm_args(provider)), monkeypatch), provider)


def test_the_args_build_the_model_with_the_flags_that_are_never_read(provider, monkeypatch):
    args = megatron_lm_args(provider)
    short = megatron_lm_flags(args, use_checkpoint_args=True)
    assert short[0] == "--use-checkpoint-args"
    assert_same_model(parse(short, monkeypatch, checkpoint_args=args), provider)


def test_args_are_of_plain_types(provider):
    buffer = io.BytesIO()
    torch.save(megatron_lm_args(provider), buffer)
    buffer.seek(0)
    # megatron.core allows Namespace; with safe_globals, the tests after this one would find it taken back
    assert torch.load(buffer, weights_only=True) == megatron_lm_args(provider)


def test_args_leave_the_choices_of_the_training_run_open(provider):
    args = vars(megatron_lm_args(provider))
    assert {"tokenizer_type", "tokenizer_model", "moe_grouped_gemm", "moe_token_dispatcher_type"}.isdisjoint(args)
    assert args["no_save_optim"] and args["no_save_rng"] and args["consumed_train_samples"] == 0


def test_padded_vocabulary_is_the_one_that_the_model_has():
    provider = make_provider(should_pad_vocab=True, make_vocab_size_divisible_by=128, tensor_model_parallel_size=2)
    assert megatron_lm_args(provider).padded_vocab_size == 512


def test_an_activation_without_a_flag_is_reported(caplog):
    args = megatron_lm_args(make_provider(activation_func=F.gelu))
    assert args.bridge_activation == "gated gelu"
    with caplog.at_level(logging.WARNING):
        megatron_lm_flags(args)
    assert "No flags of pretrain_gpt.py give this model, Megatron Bridge trains it: the activation" in caplog.text


def test_a_pair_of_rotary_bases_stays_a_pair():
    """Gemma 3 has one for local attention and one for global attention."""
    assert megatron_lm_args(make_provider(rotary_base=(10000.0, 1e6))).rotary_base == [10000.0, 1000000.0]


@pytest.mark.parametrize("use_checkpoint_args", [True, False])
def test_a_training_s_args_say_what_the_release_s_say(provider, monkeypatch, use_checkpoint_args):
    """An export compares them: Megatron-LM fills in what the release leaves out, and spells it in its own way."""
    args = megatron_lm_args(provider)
    flags = megatron_lm_flags(args, use_checkpoint_args=use_checkpoint_args)
    trained = facts(parse(flags, monkeypatch, args if use_checkpoint_args else None))
    expected = facts(args)
    assert expected.keys() <= trained.keys()
    assert {name: (trained[name], each) for name, each in expected.items() if differ(trained[name], each)} == {}


def test_every_arg_of_the_table_is_compared_or_chosen_by_a_training():
    assert unknown() == set()
