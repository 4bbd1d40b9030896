# SPDX-License-Identifier: Apache-2.0
"""Mappings make parameters of stored tensors, and leave the tensors as they are."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from megatron.bridge.models.conversion.param_mapping import AutoMapping, RMSNorm2ZeroCenteredRMSNormMapping
from megatron.bridge.models.conversion.quantization_utils import dequantize_fp8_blockwise
from megatron.bridge.models.conversion.streaming.convert import Computed, IgnoreMeta, LastUsed, StoredState
from megatron.bridge.models.conversion.streaming.sources import InFile
from megatron.bridge.models.conversion.streaming.tensor import Computing, PiecewiseTensor
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource


def test_what_is_computed_is_computed_when_it_is_read():
    calls, values = [], torch.arange(96.0).view(12, 8)
    source = Computed(lambda: PiecewiseTensor.wrap(calls.append("") or values).cast(torch.bfloat16), torch.bfloat16)
    tensor = torch.cat([PiecewiseTensor.of(source, [12, 8])[3:5], values[:1].bfloat16()])
    assert not calls and not tensor.in_files
    assert torch.equal(tensor.materialize(), torch.cat([values[3:5], values[:1]]).bfloat16())
    assert len(calls) == 1


@pytest.mark.parametrize("change", [lambda a: a, lambda a: a + 1, lambda a: (a + 1).bfloat16()])
def test_what_moves_to_the_meta_device_stays_where_it_is(change):
    values = torch.arange(6.0)
    with IgnoreMeta(), Computing():
        moved = change(PiecewiseTensor.wrap(values)).to(device="meta")
        cast = change(PiecewiseTensor.wrap(values)).to(device="meta", dtype=torch.float16)
    assert torch.equal(PiecewiseTensor.wrap(moved).materialize(), change(values))
    assert torch.equal(PiecewiseTensor.wrap(cast).materialize(), change(values).half())


def stored(tmp_path, tensor):
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    return StoredState(SafeTensorsStateSource(tmp_path))["weight"]


def test_a_mapping_that_changes_its_clone_in_place_leaves_the_file(tmp_path):
    """As Qwen3-Next's norms do."""
    norm = torch.nn.Linear(8, 1, device="meta")
    mapping = RMSNorm2ZeroCenteredRMSNormMapping("decoder.final_layernorm.weight", "model.norm.weight")
    AutoMapping.register_module_type("Linear", "replicated")
    weight = torch.arange(8, dtype=torch.bfloat16)
    tensor = stored(tmp_path, weight)
    with torch.no_grad(), IgnoreMeta(), Computing():
        converted = mapping.hf_to_megatron(tensor, norm)
    assert torch.equal(PiecewiseTensor.wrap(converted).materialize(), weight - 1)
    assert torch.equal(tensor.materialize(), weight)


def test_blocks_of_fp8_with_scales_of_their_own_are_read_once(tmp_path, monkeypatch):
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    counts, blocks = [], InFile.blocks
    monkeypatch.setattr(
        InFile, "blocks", lambda *args: (counts.append(len(block)) or block for block in blocks(*args))
    )
    with Computing():
        values = dequantize_fp8_blockwise(stored(tmp_path, weight), scales)
    assert torch.equal(values, dequantize_fp8_blockwise(weight, scales))
    assert sum(counts) == weight.numel()


def test_layers_that_threads_use_in_turn_are_made_once():
    made, held = [], LastUsed()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def get(pool, key):
            value = pool.submit(held.get, key, lambda: made.append(key) or key.upper()).result()
            assert value == key.upper()

        for _ in range(5):
            get(one, "a")
            get(other, "b")
        assert made == ["a", "b"]
        get(one, "b")
        assert made == ["a", "b"]
        get(one, "c")
        get(other, "c")
        assert made == ["a", "b", "c"]
        assert list(held._values.values()) == [("c", "C")] * 2


def test_a_name_is_looked_up_and_not_searched_for(tmp_path, monkeypatch):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    state = StoredState(SafeTensorsStateSource(tmp_path))
    monkeypatch.setattr(SafeTensorsStateSource, "get_all_keys", None)
    assert "weight" in state and "other" not in state
    assert torch.equal(state.get("weight"), torch.ones(2)) and state.get("other") is None
