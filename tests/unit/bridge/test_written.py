# SPDX-License-Identifier: Apache-2.0
"""Nothing that an import has only allocated is written."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from tiny_models import save_hf_model

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion import written


@pytest.fixture
def gpt_with_a_buffer(monkeypatch):
    """Let Megatron Core's model save a buffer that no bridge knows."""
    make = GPTModel.sharded_state_dict

    def sharded_state_dict(self, *args, **kwargs):
        buffer = {"decoder.cache": torch.empty(8)}
        return make(self, *args, **kwargs) | make_sharded_tensors_for_checkpoint(buffer, "")

    monkeypatch.setattr(GPTModel, "sharded_state_dict", sharded_state_dict)


@pytest.mark.parametrize("options", [{}, {"streaming": False}, {"strict": False}])
def test_what_has_no_source_is_refused(tmp_path, gpt_with_a_buffer, options):
    with pytest.raises(ValueError, match="has no source for 'decoder.cache', which the Megatron model saves beside"):
        AutoBridge.import_ckpt(save_hf_model(tmp_path / "hf"), tmp_path / "out", verify=False, **options)
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()


def test_other_saves_are_left_alone():
    written.check_written({"model": {"decoder.cache": torch.empty(8)}})
