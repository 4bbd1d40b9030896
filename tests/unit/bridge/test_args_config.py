# SPDX-License-Identifier: Apache-2.0
"""The args of a checkpoint make the config of the first family that can say them."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import hf_config

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import args_config, trained_config
from megatron.bridge.release_checkpoint.architecture import differ, facts
from megatron.bridge.release_checkpoint.args import megatron_lm_args


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a config of the args of a model."""

    def make(args: Namespace | None) -> Any:
        tensors = {"embedding.word_embeddings.weight": ((384, 64), "float32")}
        payload = SimpleNamespace(path=tmp_path, args=args, metadata=SimpleNamespace(tensors=tensors), damage=[])
        for module in (args_config, trained_config):
            monkeypatch.setattr(module, "examine_payload", lambda folder: payload)
            monkeypatch.setattr(module, "resolve_checkpoint", str)
        monkeypatch.setattr(trained_config, "is_payload", lambda folder: True)
        return args_config.config_of_args(tmp_path)

    return make


def args_of(config: Any) -> Namespace:
    return megatron_lm_args(AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False))


ROWS = [
    ("llama-3", {}, "llama"),
    ("llama-3.1", {}, "llama"),
    ("llama-3", {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True}, "llama"),
    ("mistral", {"sliding_window": 8}, "mistral"),
    ("qwen2", {}, "qwen2"),
    ("qwen3", {}, "qwen3"),
    ("qwen3-moe", {"mlp_only_layers": [1]}, "qwen3_moe"),
]


@pytest.mark.parametrize(("family", "changes", "model_type"), ROWS)
def test_the_config_has_the_model_of_the_args(
    made: Any, family: str, changes: dict[str, Any], model_type: str
) -> None:
    args = args_of(hf_config(family, **changes))
    config = made(args)
    assert config.model_type == model_type and config.bos_token_id is None
    assert facts(args_of(config)) == facts(args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalization": None}, "don't say normalization: pass the trained Hugging Face model"),
        ({"softmax_type": "learnable"}, "no family of LlamaForCausalLM"),
    ],
)
def test_args_that_no_family_has_are_refused(made: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        made(Namespace(**vars(args_of(hf_config("llama-3"))) | change))
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_args_is_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="don't say num_layers, hidden_size"):
        made(None)


def test_a_damaged_checkpoint_is_refused_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = SimpleNamespace(path="OUT", args=None, damage=[".metadata is missing"])
    monkeypatch.setattr(args_config, "examine_payload", lambda folder: payload)
    monkeypatch.setattr(args_config, "resolve_checkpoint", str)
    with pytest.raises(ValueError, match="OUT can't be loaded: .metadata is missing; copy or save"):
        args_config.config_of_args("OUT")


ROPE = {"rotary_base": 10000, "position_embedding_type": "rope"}
WINDOW = {"num_layers": 2, "window_size": [7, 0]}
EXPERTS = {"num_layers": 2, "num_experts": 4, "moe_router_load_balancing_type": "aux_loss"}


@pytest.mark.parametrize(
    ("args", "change"),
    [
        (ROPE, {"rotary_base": 20000}),
        (ROPE, {"rotary_percent": 0.5}),
        (ROPE, {"use_rope_scaling": True}),
        (ROPE, {"rotary_seq_len_interpolation_factor": 4}),
        (ROPE, {"position_embedding_type": "learned_absolute"}),
        (ROPE, {"no_rope_freq": [0, 1]}),
        (WINDOW, {"window_size": [7, 7]}),
        (EXPERTS, {"moe_router_load_balancing_type": "sinkhorn"}),
    ],
)
def test_args_of_another_model(args: dict, change: dict) -> None:
    one, other = facts(Namespace(**args)), facts(Namespace(**args | change))
    assert [name for name in one if differ(one[name], other[name])]


def test_args_that_are_missing_say_nothing() -> None:
    assert facts(Namespace()) == {}
