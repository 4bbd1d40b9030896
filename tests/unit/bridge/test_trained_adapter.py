# SPDX-License-Identifier: Apache-2.0
"""What Bridge has trained with LoRA is exported merged, and as an adapter that PEFT merges to the same bits."""

import shutil
from unittest.mock import MagicMock

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import OptimizerConfig
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_weights, save_hf_model
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.host import accelerator
from megatron.bridge.models.conversion.trained_adapter import export_adapter
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import checkpointing, model_load_save
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig, RNGConfig
from megatron.bridge.training.state import GlobalState


pytestmark = pytest.mark.skipif(
    accelerator.is_available() or HAVE_TE, reason="compares bits of what is computed without an accelerator"
)
NO_TRAINING = dict.fromkeys(("train", "ddp", "scheduler", "dataset", "tokenizer", "dist"))


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def release(tmp_path, hf_model):
    AutoBridge.import_ckpt(hf_model, tmp_path / "release")
    return tmp_path / "release"


def save_adapters(hf_model, base, folder, peft):
    """Save random adapters of a base as a training with Bridge saves them. Return the weights that Bridge makes."""
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    provider = bridge.to_megatron_provider()
    provider.finalize()
    provider.register_pre_wrap_hook(lambda chunks: peft(chunks, training=True))
    state = GlobalState()
    paths = {"pretrained_checkpoint": str(base), "save": str(folder)}
    state.cfg = ConfigContainer(
        **NO_TRAINING,
        checkpoint=CheckpointConfig(ckpt_format="torch_dist", save_optim=False, save_rng=False, **paths),
        model=provider,
        logger=LoggerConfig(),
        rng=RNGConfig(),
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        peft=peft,
    )
    state._timers = MagicMock()
    state.train_state.step = 4
    with model_load_save.temporary_distributed_context(backend="gloo"):
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        torch.manual_seed(3)
        for name, parameter in model[0].named_parameters():
            if ".adapter." in name:
                parameter.data = torch.randn_like(parameter) / 4
        checkpointing.save_checkpoint(state, model, None, None, 0)
        return dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))


def test_adapters_are_exported_merged_and_alone(hf_model, release, tmp_path):
    by_bridge = save_adapters(hf_model, release, tmp_path / "own", LoRA(dim=4))
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    bridge.export_ckpt(tmp_path / "own", tmp_path / "merged", show_progress=False)
    export_adapter(bridge, tmp_path / "own", tmp_path / "adapter")
    written = sorted(each.name for each in (tmp_path / "adapter").iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors"]
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert_same_weights(merged, by_peft.state_dict())
    untrained = load_file(hf_model / "model.safetensors")
    assert by_bridge.keys() == merged.keys()
    for name, tensor in by_bridge.items():
        torch.testing.assert_close(merged[name], tensor)
    # Two layers, seven projections.
    assert sum(not torch.equal(merged[name], untrained[name]) for name in merged) == 14


def test_adapters_are_merged_in_a_process_group_that_is_there(hf_model, release, tmp_path):
    """As they are without one."""
    save_adapters(hf_model, release, tmp_path / "own", LoRA(dim=4))
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    bridge.export_ckpt(tmp_path / "own", tmp_path / "merged", show_progress=False)
    with accelerator.gloo_group():
        bridge.export_ckpt(tmp_path / "own", tmp_path / "in-group", show_progress=False)
    one, other = (tmp_path / name / "model.safetensors" for name in ("merged", "in-group"))
    assert one.read_bytes() == other.read_bytes()


def test_adapters_whose_base_is_gone_are_exported_alone(hf_model, release, tmp_path):
    save_adapters(hf_model, release, tmp_path / "own", LoRA(dim=4))
    shutil.rmtree(release)
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    with pytest.raises(ValueError, match="holds adapters alone, and their base .* is not there"):
        bridge.export_ckpt(tmp_path / "own", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    export_adapter(bridge, tmp_path / "own", tmp_path / "adapter")
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")


def test_what_is_no_lora_is_refused_by_name(hf_model, release, tmp_path):
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    with pytest.raises(ValueError, match="holds no adapters: export it as a model"):
        export_adapter(bridge, release, tmp_path / "adapter")
    save_adapters(hf_model, release, tmp_path / "own", DoRA(dim=4))
    with pytest.raises(ValueError, match=r"was trained with megatron\.bridge\.peft\.dora\.DoRA, expected megatron"):
        export_adapter(bridge, tmp_path / "own", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
