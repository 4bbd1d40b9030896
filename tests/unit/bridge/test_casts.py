# SPDX-License-Identifier: Apache-2.0
"""Casts of an import: those that nobody asked for are told, those that overflow are refused."""

from types import SimpleNamespace

import pytest
import torch
from test_quantized import rewrite
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import casts


NORM, WEIGHT = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def fill(tensors, value):
    """Change one row of a weight."""
    tensors[WEIGHT][3:4] = value


@pytest.fixture
def hf(tmp_path):
    """A checkpoint in bf16, with a norm in float32."""
    folder = save_hf_model(tmp_path / "hf")
    kept = (NORM,)
    rewrite(
        folder, lambda tensors: {name: each if name in kept else each.bfloat16() for name, each in tensors.items()}
    )
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cast_that_nobody_asked_for_is_told(hf, tmp_path, caplog, streaming):
    rewrite(hf, dict, dtype="bfloat16")
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    told = [record.getMessage() for record in caplog.records if record.module == "casts"]
    assert told == [f"cast from torch.float32 to torch.bfloat16, the dtype of the Megatron model: '{NORM}'"]


def test_a_dtype_that_is_asked_for_needs_no_word(hf, tmp_path, caplog):
    AutoBridge.import_ckpt(hf, tmp_path / "out", torch_dtype=torch.float16)
    assert "casts" not in {record.module for record in caplog.records}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cast_that_overflows_is_refused(hf, tmp_path, streaming):
    rewrite(hf, lambda tensors: fill(tensors, -1e5), dtype="float16")
    with pytest.raises(ValueError) as caught:
        AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    assert str(caught.value) == (
        f"{WEIGHT} holds 99840 as torch.bfloat16, torch.float16 goes up to 65504: choose a dtype that can hold it, "
        "such as torch_dtype=torch.bfloat16 (--dtype bfloat16)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [True, False])
def test_infinity_in_the_source_stays(hf, tmp_path, caplog, streaming):
    rewrite(hf, lambda tensors: fill(tensors, torch.inf), dtype="float16")
    AutoBridge.import_ckpt(hf, tmp_path / "out", streaming=streaming)
    assert "holds NaN or infinite weights" in caplog.text


@pytest.mark.parametrize("kept, cast", [((), ["name"]), (("weight",), [])])
def test_a_parameter_that_its_module_keeps_in_float32_is_not_cast(kept, cast):
    module = torch.nn.Linear(1, 1)
    module.config, module._keep_in_float32_parameter_names = SimpleNamespace(params_dtype=torch.bfloat16), kept
    task = SimpleNamespace(param_weight=module.weight, megatron_module=module, global_param_name="router.weight")
    account = SimpleNamespace(tasks=[task], reads=lambda task: ["name"], stored={"name": torch.empty(1)})
    assert [name for *_, names in casts._casts(account) for name in names] == cast
