# SPDX-License-Identifier: Apache-2.0
"""While a checkpoint is exported, the config of the bridge is what its args and weights say."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import hf_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import trained_config, trained_weights
from megatron.bridge.models.conversion.trained_weights import true_vocabulary
from megatron.bridge.release_checkpoint.args import megatron_lm_args


BASE = {"max_position_embeddings": 256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}


def bridge(family: str = "llama-3", **changes: Any) -> AutoBridge:
    return AutoBridge.from_hf_config(hf_config(family, **BASE | changes))


def args_of(trained: AutoBridge) -> Namespace:
    """Return the args with which a training of this model saves."""
    return megatron_lm_args(trained.to_megatron_provider(load_weights=False))


def of_megatron_lm(values: dict[str, Any]) -> Namespace:
    """Return args without the ones that only Bridge writes."""
    return Namespace(**{name: value for name, value in values.items() if not name.startswith("bridge_")})


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives the config of a bridge while it exports a checkpoint, and the overrides."""

    def export(
        onto: AutoBridge,
        args: Namespace | None,
        rows: int = 384,
        layers: int = 2,
        dtype: str = "float32",
        damage: tuple[str, ...] = (),
    ) -> tuple[Any, dict[str, Any]]:
        tensors = {
            "embedding.word_embeddings.weight": ((rows, 64), dtype),
            "decoder.layers.self_attention.linear_proj.weight": ((layers, 64, 64), dtype),
        }
        payload = SimpleNamespace(
            path=tmp_path, args=args, metadata=SimpleNamespace(tensors=tensors), damage=list(damage)
        )
        monkeypatch.setattr(trained_config, "examine_payload", lambda folder: payload)
        monkeypatch.setattr(trained_config, "is_payload", lambda folder: True)
        monkeypatch.setattr(trained_config, "resolve_checkpoint", str)
        before = onto.hf_pretrained.to_dict()
        with trained_config.as_trained(onto, tmp_path):
            found = onto.hf_pretrained, trained_config.overrides(onto)
        assert onto.hf_pretrained.to_dict() == before and trained_config.overrides(onto) == {}
        return found

    return export


CHANGES = [
    {"rope_theta": 20000.0},
    {"rope_theta": 20000.0, "rms_norm_eps": 1e-3},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 1},
    {"intermediate_size": 96},
    {"num_hidden_layers": 4},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_config_has_what_was_trained(exported: Any, changes: dict[str, Any]) -> None:
    trained = bridge(**changes)
    config, _ = exported(bridge(), args_of(trained), layers=changes.get("num_hidden_layers", 2))
    after = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    assert vars(megatron_lm_args(after)) == vars(args_of(trained))


def test_a_scaling_that_was_left_out_is_gone(exported: Any) -> None:
    """Whoever forgets --use-rope-scaling trains without it."""
    config, _ = exported(bridge("llama-3.1"), args_of(bridge(rope_theta=500000.0)))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_scaling_that_bridge_has_not_is_gone(exported: Any, scaling: dict[str, Any]) -> None:
    """Bridge's model of such a config is that of another, which was trained."""
    scaling["original_max_position_embeddings"] = 64
    values = vars(args_of(bridge("llama-3.1" if scaling["rope_type"] == "llama3" else "llama-3", rope_theta=500000.0)))
    config, _ = exported(bridge(rope_parameters={"rope_theta": 500000.0, **scaling}), of_megatron_lm(values))
    if scaling["rope_type"] == "llama3":
        assert config.rope_parameters["original_max_position_embeddings"] == 8192
    else:
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_an_original_length_beside_the_scaling_is_written(exported: Any) -> None:
    rope = {"rope_theta": 500000.0, "rope_type": "yarn", "factor": 4.0}
    trained = bridge(rope_parameters=rope | {"original_max_position_embeddings": 32})
    config, _ = exported(bridge(rope_parameters=rope, original_max_position_embeddings=64), args_of(trained))
    assert config.original_max_position_embeddings == 32


def test_a_damaged_checkpoint_is_refused(exported: Any) -> None:
    with pytest.raises(ValueError, match="can't be loaded: .metadata is missing; copy or save the checkpoint again"):
        exported(bridge(), args_of(bridge()), damage=(".metadata is missing",))


def test_what_is_the_same_changes_nothing(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    config, overrides = exported(bridge(), args_of(bridge()))
    assert {**config.to_dict(), "dtype": None} == {**bridge().hf_pretrained.to_dict(), "dtype": None}
    assert overrides == {"bf16": False, "fp16": False}
    assert "what was trained" not in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"add_qkv_bias": True}, "attention_bias is True"),
        ({"qk_layernorm": True}, "qk_layernorm is True in the checkpoint and False"),
        ({"rotary_percent": 0.5}, "rope"),
        ({"swiglu": False}, "activation is 'another'"),
        ({"position_embedding_type": "learned_absolute"}, "'learned_absolute'"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"num_experts": 4, "moe_router_topk": 2}, "num_experts is 4 in the checkpoint and None"),
        ({"num_layers": 3}, "num_layers is 3 by the args and 2 in the weights"),
        ({"window_size": [7, 7]}, "windows is [[7, 7], [7, 7]]"),
    ],
)
def test_what_the_config_cannot_say_is_refused(exported: Any, change: dict[str, Any], words: str) -> None:
    args = Namespace(**vars(args_of(bridge())) | change)
    with pytest.raises(ValueError) as error:
        exported(bridge(), args)
    assert words in str(error.value) and "\n" not in str(error.value)


REMARKS = [
    ({"rope_scaling_factor": 32.0}, "--rope-scaling-factor 32.0, which pretrain_gpt.py up to core 0.19 drops"),
    ({"moe_expert_capacity_factor": 1.0}, "transformers' model drops no tokens"),
    ({"spec": ["a.module", "a_spec"]}, "nothing compares these layers"),
]


@pytest.mark.parametrize(("change", "words"), REMARKS)
def test_what_nothing_shows_is_said(
    exported: Any, caplog: pytest.LogCaptureFixture, change: dict[str, Any], words: str
) -> None:
    values = vars(args_of(bridge("llama-3.1"))) | change
    exported(bridge("llama-3.1"), of_megatron_lm(values))
    assert words in caplog.text


def test_a_head_size_is_written_though_the_config_has_none(exported: Any) -> None:
    """Qwen2's model reads it, and Qwen2's config has no default of it."""
    config, _ = exported(bridge("qwen2"), Namespace(**vars(args_of(bridge("qwen2"))) | {"kv_channels": 24}))
    assert config.head_dim == 24


def test_a_dense_model_is_no_mixture_of_experts(exported: Any) -> None:
    """transformers' config refuses to have no experts."""
    with pytest.raises(ValueError, match="num_experts is None in the checkpoint and 4"):
        exported(bridge("qwen3-moe"), args_of(bridge("qwen3")))


VOCABULARY = [
    (256, {}, 256, ""),
    (512, {"tensor_model_parallel_size": 2}, 512, "rows 384 to 511 of the vocabulary go into the export"),
    (512, {"vocab_size": 400}, 400, ""),
    (512, {"vocab_size": 380}, 384, ""),
    (512, {"vocab_size": 512}, 512, ""),
]


@pytest.mark.parametrize(("stored", "said", "rows", "words"), VOCABULARY)
def test_rows_of_the_vocabulary(
    exported: Any, caplog: pytest.LogCaptureFixture, stored: int, said: dict[str, Any], rows: int, words: str
) -> None:
    """No row is invented, and none is dropped that the args don't say to be padding."""
    args = Namespace(**vars(args_of(bridge())) | said | {"padded_vocab_size": stored})
    config, overrides = exported(bridge(), args, rows=stored)
    assert config.vocab_size == rows and overrides["vocab_size"] == rows and not overrides["should_pad_vocab"]
    assert words in caplog.text


def test_tokens_without_a_row_are_refused(exported: Any) -> None:
    with pytest.raises(ValueError, match="pad_token_id 300 of config.json has none"):
        exported(bridge(pad_token_id=300), args_of(bridge()), rows=256)


def test_without_args_the_shapes_decide(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    config, overrides = exported(bridge(), None, rows=512, dtype="bfloat16")
    assert (config.vocab_size, config.dtype) == (512, torch.bfloat16)
    assert overrides["bf16"] and "holds no Megatron-LM args" in caplog.text
    with pytest.raises(
        ValueError, match="holds other weights than its config.json: num_layers is 2 by the args and 3"
    ):
        exported(bridge(), None, layers=3)


@pytest.mark.parametrize(("length", "found"), [(128, 256), (1024, 1024)])
def test_a_context_length_is_never_lowered(exported: Any, length: int, found: int) -> None:
    args = Namespace(**vars(args_of(bridge())) | {"max_position_embeddings": length})
    assert exported(bridge(), args)[0].max_position_embeddings == found


def test_bridge_says_what_it_has_padded(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text("model:\n  vocab_size: 384\n")
    assert exported(bridge(), args_of(bridge()), rows=512)[0].vocab_size == 384


def test_a_tokenizer_in_the_cache_of_the_hub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(Tokenizer(WordLevel({"a": 0, "b": 7})).to_str())
    monkeypatch.setattr(trained_weights, "try_to_load_from_cache", lambda *_: str(tmp_path / "tokenizer.json"))
    assert true_vocabulary(Namespace(tokenizer_model="org/model")) == 8


def test_a_null_tokenizer_adds_a_token() -> None:
    assert true_vocabulary(Namespace(vocab_size=383, tokenizer_type="NullTokenizer")) == 384
    assert true_vocabulary(Namespace(tokenizer_model="org/model")) is None


@pytest.mark.parametrize(
    "saved, expected", [("model: {bf16: true}", "bf16"), ("model: {bf16: false}", None), ("{}", None), (None, None)]
)
def test_weights_that_bridge_keeps_in_float32_do_not_decide_the_precision(
    tmp_path: Path, saved: str | None, expected: str | None
) -> None:
    """Otherwise one weight in float32 makes the export float32, which keeps every weight."""
    if saved:
        (tmp_path / "run_config.yaml").write_text(saved)
    tensors = {
        "embedding.weight": ((384, 64), "bfloat16"),
        "decoder.layers.mlp.router.weight": ((2, 4, 64), "float32"),
    }
    payload, config = SimpleNamespace(path=tmp_path, metadata=SimpleNamespace(tensors=tensors)), SimpleNamespace()
    found = trained_weights.follow_precision(payload, config)
    assert found == {"bf16": expected == "bf16", "fp16": False}
    assert config.dtype == (torch.bfloat16 if expected else torch.float32)
