# SPDX-License-Identifier: Apache-2.0
"""Bridge's own training on a release: its start, a save next to `release/`, LoRA, and how each of them resumes.

Models, hooks, saves and loads are Bridge's own. What stands around them in its `setup` needs a GPU (NCCL, timers that
synchronize devices, DDP's streams, the loss scale of Megatron Core's optimizer) and is left out, as is the GPU's
random state.
"""

import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer
from tiny_models import assert_same_weights, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.release_checkpoint.layout import TRACKER
from megatron.bridge.training import checkpointing, model_load_save, setup
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig, RNGConfig
from megatron.bridge.training.state import GlobalState


SAVED = 4


class Optimizer(FP32Optimizer):
    """Megatron Core's, without the loss scale that its constructor puts on a GPU."""

    def __init__(self, parameters, config):
        MegatronOptimizer.__init__(self, torch.optim.AdamW(parameters, lr=0.01), config, self.init_state)
        self.is_stub_optimizer = False

    @staticmethod
    def init_state(optimizer, config):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


class Training:
    """A process that trains, built and loaded in the order of Bridge's `setup`."""

    def __init__(self, hf_model, lora, **paths):
        provider = AutoBridge.from_hf_pretrained(hf_model).to_megatron_provider(load_weights=False)
        provider.finalize()
        given = {key: str(path) for key, path in paths.items()}
        self.state = GlobalState()
        self.state.cfg = cfg = ConfigContainer(
            **dict.fromkeys(("train", "ddp", "scheduler", "dataset", "tokenizer", "dist")),
            checkpoint=CheckpointConfig(ckpt_format="torch_dist", save_rng=False, load_rng=False, **given),
            model=provider,
            logger=LoggerConfig(),
            rng=RNGConfig(),
            optimizer=OptimizerConfig(use_distributed_optimizer=False),
            peft=LoRA(dim=4) if lora else None,
        )
        self.state._timers = MagicMock()
        provider.register_pre_wrap_hook(setup._create_peft_pre_wrap_hook(cfg, self.state))
        self.model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        self.optimizer = Optimizer([each for each in self.model[0].parameters() if each.requires_grad], cfg.optimizer)
        self.iteration = 0
        if setup._should_load_checkpoint(cfg, checkpointing.create_checkpoint_manager(cfg.checkpoint)):
            if lora:
                cfg.checkpoint.finetune = False
            self.iteration, _ = checkpointing.load_checkpoint(self.state, self.model, self.optimizer, None)

    def train_and_save(self):
        for _ in range(2):
            for parameter in self.trained().values():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.optimizer.step()
        self.state.train_state.step = SAVED
        checkpointing.save_checkpoint(self.state, self.model, self.optimizer, None, 0)

    def trained(self):
        return {name: each for name, each in self.model[0].named_parameters() if each.requires_grad}

    def base(self):
        parameters = self.model[0].named_parameters()
        return {name.replace("to_wrap.", ""): each for name, each in parameters if ".adapter." not in name}

    def moments(self):
        states = self.optimizer.state_dict()["state"]
        return {(index, name): each for index, state in states.items() for name, each in state.items()}

    def assert_resumes(self, other):
        """That `other` goes on where this one saved, bit for bit."""
        assert other.iteration == other.state.train_state.step == SAVED
        assert_same_weights(self.base(), other.base())
        assert_same_weights(self.trained(), other.trained())
        assert_same_weights(self.moments(), other.moments())


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory, hf_model):
    root = tmp_path_factory.mktemp("release")
    AutoBridge.import_ckpt(hf_model, root)
    return root


@pytest.fixture
def release(imported, tmp_path):
    return Path(shutil.copytree(imported, tmp_path / "root"))


@pytest.fixture
def start(hf_model):
    init_num_microbatches_calculator(0, None, 1, 1, 1, False)
    with model_load_save.temporary_distributed_context(backend="gloo"):
        yield lambda lora=False, **paths: Training(hf_model, lora, **paths)
    unset_num_microbatches_calculator()


@pytest.fixture
def base(hf_model, start):
    """The weights of the model that was imported, straight from Hugging Face's."""
    (model,) = AutoBridge.from_hf_pretrained(hf_model).to_megatron_model(
        wrap_with_ddp=False, use_cpu_initialization=True
    )
    return dict(model.named_parameters())


def assert_adapters_are_fresh(training):
    adapters = training.trained()
    # Four linear layers in each of two layers, two matrices each.
    assert len(adapters) == 16 and all(".adapter." in name for name in adapters)
    for name, matrix in adapters.items():
        assert ("linear_out" in name) == (matrix.count_nonzero() == 0), name


def assert_release_stays(root, before, also=()):
    assert {path.name for path in root.iterdir()} == {"release", TRACKER, *also}
    assert_same_weights(weights(root / "release"), before)


NEXT_TO_RELEASE = (f"iter_{SAVED:07d}", "latest_train_state.pt")


@pytest.mark.parametrize("folder", ["", "release"])
@pytest.mark.parametrize("lora", [False, True])
def test_finetuning_starts_from_a_release_and_resumes(start, release, base, tmp_path, lora, folder):
    before = weights(release / "release")
    paths = {"pretrained_checkpoint": release / folder, "load": tmp_path / "own", "save": tmp_path / "own"}
    training = start(lora, **paths)
    assert training.iteration == 0
    assert_same_weights(training.base(), base)
    if lora:
        assert_adapters_are_fresh(training)
    training.train_and_save()
    resumed = start(lora, **paths)
    training.assert_resumes(resumed)
    if lora:
        assert_same_weights(resumed.base(), base)
    assert_release_stays(release, before)
    assert (release / TRACKER).read_text() == "release"


def test_an_adapter_checkpoint_holds_adapters_only(start, release, tmp_path):
    training = start(lora=True, pretrained_checkpoint=release, save=tmp_path / "own")
    training.train_and_save()
    saved = weights(tmp_path / "own" / f"iter_{SAVED:07d}")
    assert all(".adapter." in key for key in saved) and any(key.startswith("optimizer.") for key in saved)


@pytest.mark.parametrize("pretrained", [False, True])
def test_training_that_saves_next_to_a_release_resumes_there(start, release, base, pretrained):
    before = weights(release / "release")
    paths = {"load": release, "save": release, **({"pretrained_checkpoint": release} if pretrained else {})}
    training = start(**paths)
    assert training.iteration == 0
    assert_same_weights(training.base(), base)
    training.train_and_save()
    assert_release_stays(release, before, NEXT_TO_RELEASE)
    assert (release / TRACKER).read_text() == str(SAVED)
    training.assert_resumes(start(**paths))
    # From the release once more, for whoever sets the tracker back.
    (release / TRACKER).write_text("release")
    again = start(**paths)
    assert again.iteration == 0
    assert_same_weights(again.base(), base)


@pytest.mark.parametrize("folder", ["", "release"])
def test_adapters_saved_next_to_their_release_resume_there(start, release, base, folder):
    before = weights(release / "release")
    paths = {"pretrained_checkpoint": release / folder, "load": release, "save": release}
    training = start(lora=True, **paths)
    assert training.iteration == 0
    assert_same_weights(training.base(), base)
    assert_adapters_are_fresh(training)
    training.train_and_save()
    assert_release_stays(release, before, NEXT_TO_RELEASE)
    resumed = start(lora=True, **paths)
    training.assert_resumes(resumed)
    assert_same_weights(resumed.base(), base)


def test_adapters_go_on_what_was_trained_next_to_a_release(start, release, tmp_path):
    trained = start(pretrained_checkpoint=release, save=release)
    trained.train_and_save()
    paths = {"pretrained_checkpoint": release, "load": tmp_path / "own", "save": tmp_path / "own"}
    training = start(lora=True, **paths)
    assert_same_weights(training.base(), trained.base())
    assert_adapters_are_fresh(training)
