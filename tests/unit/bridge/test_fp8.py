# SPDX-License-Identifier: Apache-2.0
"""FP8 weights times their scales, in memory and in blocks."""

from types import SimpleNamespace

import pytest
import torch
from test_quantized import method, rewrite
from tiny_models import assert_same_weights, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.fp8 import Dequantized, dequantize
from megatron.bridge.models.conversion.streaming.sources import InMemory
from megatron.bridge.models.conversion.streaming.tensor import PiecewiseTensor


FP8 = torch.float8_e4m3fn
BLOCKS = {"quantization_config": {"weight_block_size": [32, 32]}}
GROUPS = {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [48, 24]}}}}
# name: (shape of the weight, shape of the scale, edges of a block, config)
GRIDS = {
    "tensor": ((40, 24), (), (40, 24), {}),
    "tensor, one value": ((40, 24), (1,), (40, 24), BLOCKS),
    "channel": ((40, 24), (40, 1), (1, 24), {}),
    "channel, one dimension": ((40, 24), (40,), (1, 24), BLOCKS),
    "blocks of 128": ((256, 384), (2, 3), (128, 128), {}),
    "cut off": ((200, 300), (2, 3), (128, 128), {}),
    "blocks of the config": ((96, 72), (2, 3), (48, 24), {"quantization_config": GROUPS}),
    "cut off, of the config": ((70, 33), (3, 2), (32, 32), BLOCKS),
    "groups": ((3, 300), (3, 3), (1, 128), {}),
}


def random(shape, scales):
    torch.manual_seed(1)
    return torch.randn(shape).to(FP8), torch.rand(scales) + 0.1


def expected(weight, scale, edges):
    """Each element times the scale of its block, one by one."""
    grid = scale.reshape(-1, 1 if scale.dim() < 2 else scale.shape[1])
    rows, columns = (torch.arange(size) // edge for size, edge in zip(weight.shape, edges, strict=True))
    return weight.float() * grid[rows[:, None], columns[None, :]]


@pytest.mark.parametrize("name", GRIDS)
def test_each_element_has_the_scale_of_its_block(name):
    shape, scales, edges, config = GRIDS[name]
    weight, scale = random(shape, scales)
    state = {"a.weight": weight, "a.weight_scale_inv": scale, "b": scale}
    read = Dequantized(state, SimpleNamespace(**config))
    assert torch.equal(read["a.weight"], expected(weight, scale, edges)) and read["b"] is scale
    pieces = {key: PiecewiseTensor.of(InMemory(each.reshape(-1)), each.shape) for key, each in state.items()}
    streamed = Dequantized(pieces, SimpleNamespace(**config))["a.weight"]
    for size in (weight.numel() // 9, 1 << 20):
        assert torch.equal(torch.cat(list(map(torch.clone, streamed.blocks(size)))).view(shape), read["a.weight"])
    assert torch.equal(streamed[1:3].materialize(), read["a.weight"][1:3])
    meta = Dequantized({key: each.to("meta") for key, each in state.items()}, SimpleNamespace(**config))["a.weight"]
    assert (meta.shape, meta.dtype, meta.is_meta) == (shape, torch.float32, True)


@pytest.mark.parametrize("scales", [(2, 2), (5,), (2, 1), (1, 2, 3)])
def test_a_scale_that_does_not_fit_is_refused(scales):
    with pytest.raises(
        ValueError, match=r"^x is FP8 of the shape \(256, 384\), and its scale has .* expected one value"
    ):
        dequantize("x", *random((256, 384), scales), [(128, 128)])


def test_it_is_what_transformers_computes():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for shape, scales in (((256, 384), (2, 3)), ((256, 384), (1,)), ((256, 384), (256, 1))):
        weight, scale = random(shape, scales)
        for dtype in (torch.bfloat16, torch.float32):
            theirs = finegrained.Fp8Dequantize(None)._dequantize_one(
                weight, scale.reshape(*scales, *[1] * (2 - len(scales))), dtype
            )
            assert torch.equal(dequantize("x", weight, scale, []).to(dtype), theirs)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_import_is_that_of_the_dequantized_checkpoint(tmp_path, caplog, streaming):
    hf, plain = save_hf_model(tmp_path / "hf", "qwen3"), save_hf_model(tmp_path / "plain", "qwen3")
    name = "model.layers.1.mlp.up_proj.weight"
    weight, scale = random((128, 64), (3, 2))
    others = {name.replace("weight", other): torch.ones(1) for other in ("input_scale", "k_scale")}
    rewrite(
        hf,
        lambda tensors: tensors.update({name: weight, f"{name}_scale_inv": scale, **others}),
        **method("fp8", weight_block_size=[48, 48]),
    )
    rewrite(plain, lambda tensors: tensors.update({name: expected(weight, scale, (48, 48))}))
    for each in (hf, plain):
        AutoBridge.import_ckpt(each, tmp_path / "out" / each.name, streaming=streaming)
    assert_same_weights(*(weights(tmp_path / "out" / each.name / "release") for each in (hf, plain)))
    assert caplog.text.count("scales of activations or KV caches are left out, 2 tensors") == 1
