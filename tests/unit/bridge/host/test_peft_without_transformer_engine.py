# SPDX-License-Identifier: Apache-2.0
"""LoRA without Transformer Engine."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear


pytestmark = pytest.mark.skipif(HAVE_TE, reason="shows what happens without Transformer Engine")


@pytest.fixture
def layers():
    """A module with linear layers of Megatron Core, by the names that LoRA looks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    settings = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True}
    kwargs = {"config": TransformerConfig(**settings), "init_method": torch.nn.init.normal_, "bias": False}
    module = torch.nn.Module()
    module.linear_qkv = ColumnParallelLinear(8, 24, **kwargs)
    module.linear_proj = RowParallelLinear(16, 8, input_is_parallel=True, skip_bias_add=True, **kwargs)
    yield module
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_lora_wraps_the_linear_layers_of_megatron_core(layers):
    LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4)(layers, training=False)
    shapes = {}
    for name, layer in layers.named_children():
        assert isinstance(layer, LoRALinear)
        shapes[name] = [tuple(weight.shape) for weight in layer.adapter.parameters()]
    assert shapes == {"linear_qkv": [(4, 8), (24, 4)], "linear_proj": [(4, 16), (8, 4)]}
