# SPDX-License-Identifier: Apache-2.0
"""Packed conversations: how the recorder takes them apart, and that the stand-in for attention keeps them apart."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def test_recorded_batches_have_a_row_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune

    monkeypatch.setattr(finetune, "get_args", lambda: SimpleNamespace(sft=True))
    tokens = torch.arange(1, 9).reshape(2, 4)
    # SFTDataset repeats the end of the sequence until every row has the same number of places.
    places = torch.tensor([[0, 3, 4, 4, 4], [0, 4, 4, 4, 4]], dtype=torch.int32)
    batch = {"tokens": tokens, "labels": tokens + 10, "loss_mask": torch.ones(2, 4), "cu_seqlens": places}
    rows = finetune.conversations(batch)
    assert rows["tokens"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]
    assert rows["loss_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert rows["labels"][2].tolist() == [15, 16, 17, 18]


# In a process of its own, since the emulation stays for good.
PACKED_AGAINST_SEPARATE = """
import torch
import cuda_emulation

cuda_emulation.install()
from megatron.core.packed_seq_params import PackedSeqParams

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core import parallel_state

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(0)
config = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=2, num_query_groups=1, attention_dropout=0.0,
    masked_softmax_fusion=False,
)
attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
query, key, value = torch.randn(7, 2, 4), torch.randn(7, 1, 4), torch.randn(7, 1, 4)
places = torch.tensor([0, 4, 4, 7])
packed = attention(query, key, value, None, packed_seq_params=PackedSeqParams("thd", places, places))
separate = [
    attention(*(each[part].unsqueeze(1) for each in (query, key, value)), None) for part in (slice(4), slice(4, 7))
]
assert packed.shape == (7, 1, 8), packed.shape
assert torch.equal(packed, torch.cat(separate))
whole = attention(*(each.unsqueeze(1) for each in (query, key, value)), None)
assert torch.equal(packed[:4], whole[:4]) and not torch.allclose(packed[4:], whole[4:])
"""


def test_packed_conversations_do_not_attend_to_each_other() -> None:
    folder = Path(__file__).parents[2] / "functional"
    done = subprocess.run([sys.executable, "-c", PACKED_AGAINST_SEPARATE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
