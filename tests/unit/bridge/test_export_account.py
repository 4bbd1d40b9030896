# SPDX-License-Identifier: Apache-2.0
"""An export has the tensors that transformers' model has, and its checkpoint those of Megatron Core's."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors import safe_open
from tiny_models import FAMILIES, hf_config

from megatron.bridge.models.conversion import export_account
from megatron.bridge.models.conversion.export_account import (
    Expected,
    accounted,
    check_stored,
    check_used,
    expected_of,
    expected_tensors,
    exporting,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_expected_is_what_transformers_saves(tmp_path: Path, family: str) -> None:
    config = hf_config(family)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        names = saved.keys()
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in names}
    assert expected_tensors(config).shapes == shapes


def test_quantization_is_not_exported() -> None:
    config = hf_config("llama-3", quantization_config={"quant_method": "mxfp4"})
    assert expected_tensors(config).shapes == expected_tensors(hf_config("llama-3")).shapes
    assert config.quantization_config == {"quant_method": "mxfp4"}


EXPECTED = Expected({"embed": (4, 2), "norm": (2,)}, frozenset({"head"}), (r"^mtp\.",))
TENSORS = {"embed": torch.zeros(4, 2), "norm": torch.zeros(2)}


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives the names of an export."""
    monkeypatch.setattr(export_account, "expected_of", lambda bridge: EXPECTED)

    def names(tensors: dict[str, torch.Tensor], strict: bool = True) -> list[str]:
        with exporting(strict):
            return [name for name, _ in accounted(SimpleNamespace(hf_pretrained=None), tensors.items(), strict)]

    return names


def test_an_export_may_have_what_transformers_ignores_or_ties(export) -> None:
    more = {"head": torch.zeros(4, 2), "mtp.norm": torch.zeros(2), "norm.weight_scale_inv": torch.zeros(1)}
    assert export(TENSORS | more) == [*TENSORS, *more]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"embed": TENSORS["embed"]}, "the export lacks 1 tensors of transformers' model, 'norm'"),
        (TENSORS | {"embed": torch.zeros(3, 2)}, "embed is [3, 2] in the export, transformers expects [4, 2]"),
    ],
)
def test_what_transformers_would_invent_is_refused_in_any_case(export, tensors: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        export(tensors, strict=False)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_without_a_place_is_refused_or_told(export, caplog: pytest.LogCaptureFixture) -> None:
    tensors = TENSORS | {"bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="transformers' model has no bias"):
        export(tensors)
    assert export(tensors, strict=False) == list(tensors)
    assert "transformers' model has no bias" in caplog.text


def test_a_parameter_of_which_nothing_is_made_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Its tensor isn't in the source of the bridge, which passes it over."""
    bridge = SimpleNamespace(
        _unwrap_name=lambda name: name.removeprefix("module."), _is_adapter_param_name=str.isupper
    )
    chunk = torch.nn.ParameterDict({"used": torch.zeros(1), "left": torch.zeros(1), "ADAPTER": torch.zeros(1)})
    tasks = [SimpleNamespace(param_name=name, param_weight=weight) for name, weight in (("used", 1), ("left", None))]
    check_used(bridge, [chunk], [*tasks, None])
    with exporting(True), pytest.raises(ValueError, match="exports no tensor for 'left': pass the trained"):
        check_used(bridge, [chunk], [*tasks, None])
    with exporting(False):
        check_used(bridge, [chunk], tasks)
    assert "left out" in caplog.text


def test_the_tensors_of_a_config_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(export_account, "expected_tensors", lambda config: found.append(config))
    bridge = SimpleNamespace(hf_pretrained=hf_config("llama-3"))
    with exporting(True):
        assert expected_of(bridge) is expected_of(bridge) is None
    assert len(found) == 1


def sharded(key: str, *shape: int, **options: bool) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(shape), **options)


MODEL = {
    "embedding": sharded("embedding.word_embeddings.weight", 4, 2, allow_shape_mismatch=True),
    "fc1": ShardedTensorFactory("fc1", torch.zeros(4, 2), lambda key, *_: [sharded(key, 4, 2)], None),
}
NORM = {"fused": sharded("decoder.layers.mlp.linear_fc1.layer_norm_weight", 2)}
STORED = {"embedding.word_embeddings.weight": (4, 2), "fc1": (4, 2)}
STORED |= dict.fromkeys((NORM["fused"].key, "decoder.layers.pre_mlp_layernorm.weight"), (2,))


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that compares the model with stored shapes."""
    (tmp_path / ".metadata").touch()

    def compare(stored: dict[str, tuple[int, ...]]) -> None:
        metadata = SimpleNamespace(tensors={name: (shape, "float32") for name, shape in stored.items()})
        monkeypatch.setattr(export_account, "read_metadata", lambda file: metadata)
        check_stored({"model": MODEL | NORM}, tmp_path)

    return compare


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"fc1": (4, 2)}, "lacks 2 tensors of the model"),
        (STORED | {"fc1": (6, 2)}, r"has fc1 in the shape [6, 2], the model in [4, 2]"),
        (STORED | {"embedding.word_embeddings.weight": (4, 3)}, "in the shape [4, 3]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(check, stored: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        check(stored)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_stored_tensor_without_a_place_is_refused_while_it_is_exported(
    check, caplog: pytest.LogCaptureFixture
) -> None:
    stored = STORED | {"output_layer.weight": (4, 2), "optimizer.state.exp_avg.fc1": (4, 2)}
    check(stored)
    with exporting(True), pytest.raises(ValueError, match="has 1 tensors without a place .* 'output_layer.weight'"):
        check(stored)
    with exporting(False):
        check(stored)
    assert "left out" in caplog.text
