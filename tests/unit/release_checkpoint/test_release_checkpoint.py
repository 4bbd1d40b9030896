# SPDX-License-Identifier: Apache-2.0
"""`import_ckpt` and `save_megatron_model` with real weights, and every reader of what they write."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig
from tiny_models import PAYLOAD, assert_same_weights, names, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.flags import megatron_lm_flags
from megatron.bridge.release_checkpoint.layout import TRACKER
from megatron.bridge.training import checkpointing, model_load_save
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args
from megatron.bridge.training.post_training.checkpointing import has_modelopt_state
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists, get_hf_model_id_from_checkpoint


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def release(tmp_path_factory, hf_model):
    root = tmp_path_factory.mktemp("release")
    AutoBridge.import_ckpt(hf_model, root)
    return root


@pytest.fixture
def copy(release, tmp_path):
    return Path(shutil.copytree(release, tmp_path / "copy"))


@pytest.fixture
def gloo():
    with model_load_save.temporary_distributed_context(backend="gloo"):
        yield


# --- what is written ---------------------------------------------------------------------------------------------


def test_import_writes_a_release_checkpoint(release):
    assert {path.name for path in release.iterdir()} == {"release", TRACKER}
    assert (release / TRACKER).read_text() == "release"
    assert names(release / "release") == PAYLOAD
    assert (release / "release/tokenizer/tokenizer.json").is_file()


def test_a_release_holds_weights_and_args_only(release):
    common = dist_checkpointing.load_common_state_dict(str(release / "release"))
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    assert common["args"].no_save_optim and common["args"].no_save_rng
    assert not {"optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine"} & common.keys()
    assert all(key.startswith(("decoder.", "embedding.", "output_layer.")) for key in weights(release / "release"))


READ_IN_A_FRESH_PROCESS = """
import argparse, sys
import torch

with torch.serialization.safe_globals([argparse.Namespace]):
    state = torch.load(sys.argv[1], weights_only=True)
assert "megatron" not in sys.modules
print(state["args"].num_layers, state["iteration"], state["checkpoint_version"])
"""


def test_the_common_state_is_a_file_that_torch_alone_reads(release):
    command = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, str(release / "release/common.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2 0 3.0\n"


@pytest.mark.parametrize("streaming", [True, False])
def test_the_file_holds_what_the_entry_holds(hf_model, tmp_path, streaming):
    AutoBridge.import_ckpt(hf_model, tmp_path, streaming=streaming)
    payload = tmp_path / "release"
    from_file = dist_checkpointing.load_common_state_dict(str(payload))
    (payload / "common.pt").unlink()
    assert dist_checkpointing.load_common_state_dict(str(payload)) == from_file


def test_import_prints_the_command_line(hf_model, tmp_path, capsys):
    AutoBridge.import_ckpt(hf_model, tmp_path / "out")
    printed = capsys.readouterr().out
    args = read_megatron_lm_args(tmp_path / "out")
    assert f"--load {tmp_path / 'out'} --use-checkpoint-args --norm-epsilon 1e-05" in printed
    assert " ".join(megatron_lm_flags(args)) in printed


def test_release_false_writes_iteration_0(hf_model, tmp_path, release):
    AutoBridge.import_ckpt(hf_model, tmp_path, release=False)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000000", TRACKER, "latest_train_state.pt"}
    assert (tmp_path / TRACKER).read_text() == "0"
    payload = tmp_path / "iter_0000000"
    assert names(payload) - {"common.pt"} == PAYLOAD - {"common.pt"} | {"train_state.pt"}
    assert "args" not in dist_checkpointing.load_common_state_dict(str(payload))
    assert_same_weights(weights(payload), weights(release / "release"))
    with pytest.raises(ValueError, match="holds no Megatron-LM args"):
        read_megatron_lm_args(tmp_path)


@pytest.mark.parametrize("low_memory_save", [False, True])
def test_both_ways_to_save_write_the_same_release(hf_model, tmp_path, release, gloo, low_memory_save):
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(
        model, tmp_path, hf_tokenizer_path=hf_model, low_memory_save=low_memory_save, release=True
    )
    assert names(tmp_path / "release") == PAYLOAD
    assert_same_weights(weights(tmp_path / "release"), weights(release / "release"))
    assert read_megatron_lm_args(tmp_path) == read_megatron_lm_args(release)


def test_save_megatron_model_writes_iteration_0_unless_told(hf_model, tmp_path, gloo):
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, tmp_path)
    assert (tmp_path / "iter_0000000").is_dir() and not (tmp_path / "release").exists()


def test_a_model_without_a_tokenizer_is_imported_without_one(hf_model, tmp_path):
    bare = tmp_path / "hf"
    shutil.copytree(hf_model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    AutoBridge.import_ckpt(bare, tmp_path / "out")
    assert names(tmp_path / "out/release") == PAYLOAD - {"tokenizer"}


def test_import_over_a_release_replaces_it(hf_model, tmp_path, copy):
    other = save_hf_model(tmp_path / "other", num_hidden_layers=3)
    AutoBridge.import_ckpt(other, copy)
    assert {path.name for path in copy.iterdir()} == {"release", TRACKER}
    assert model_load_save.load_model_config(str(copy))[0].num_layers == 3


def test_import_over_training_is_refused_before_anything_is_read(tmp_path, copy):
    (copy / "iter_0000004").mkdir()
    (copy / TRACKER).write_text("4")
    model = save_hf_model(tmp_path / "hf")
    for release in (True, False):
        with pytest.raises(FileExistsError, match="training iteration 4"):
            AutoBridge.import_ckpt(model, copy, release=release)
    assert (copy / TRACKER).read_text() == "4"


def test_a_save_that_fails_leaves_the_old_release(hf_model, copy, monkeypatch):
    before = weights(copy / "release")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dist_checkpointing, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        AutoBridge.import_ckpt(hf_model, copy)
    assert {path.name for path in copy.iterdir()} == {"release", TRACKER}
    assert_same_weights(weights(copy / "release"), before)


# --- every reader ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["", "release", "iter_0000000"], ids=["root", "payload folder", "where it was before"])
def readable(request, release):
    return release / request.param


def test_load_megatron_model(readable, hf_model, release, gloo):
    (model,) = AutoBridge.from_hf_pretrained(hf_model).load_megatron_model(readable)
    expected = weights(release / "release")["embedding.word_embeddings.weight"]
    assert torch.equal(model.embedding.word_embeddings.weight, expected)


def test_load_megatron_model_of_the_training_package(readable, gloo):
    model = model_load_save.load_megatron_model(str(readable), use_cpu_init=True, skip_temp_dist_context=True)
    assert model is not None


def test_model_config_tokenizer_and_hf_model_id(readable, hf_model):
    config, _ = model_load_save.load_model_config(str(readable))
    assert config.num_layers == 2
    assert model_load_save.load_tokenizer(str(readable)).vocab_size == 300
    assert AutoBridge.get_hf_model_id_from_checkpoint(readable) == str(hf_model)
    assert get_hf_model_id_from_checkpoint(readable) == str(hf_model)


def test_from_auto_config(readable, hf_model):
    bridge = AutoBridge.from_auto_config(str(readable), str(hf_model))
    assert bridge.hf_pretrained.num_hidden_layers == 2


def test_existence_and_modelopt_state(readable):
    assert checkpoint_exists(str(readable))
    assert has_modelopt_state(str(readable)) is False


def test_mimo_helper(readable, release):
    from megatron.bridge.models.megatron_mimo.conversion.mimo_model_io import _resolve_iter_folder

    assert _resolve_iter_folder(readable) == release / "release"


def test_export_gives_the_model_back_bit_for_bit(readable, hf_model, tmp_path):
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(readable, tmp_path)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
        for path in (hf_model, tmp_path)
    )
    assert_same_weights(before, after)


def test_readers_follow_the_tracker_to_later_training_and_back(copy, hf_model, gloo):
    iteration = copy / "iter_0000003"
    shutil.copytree(copy / "release", iteration)
    (iteration / "run_config.yaml").unlink()  # as Megatron-LM saves
    bridge = AutoBridge.from_hf_pretrained(hf_model)
    (copy / TRACKER).write_text("3")
    assert len(bridge.load_megatron_model(copy)) == 1
    assert get_hf_model_id_from_checkpoint(copy) == str(hf_model)
    shutil.rmtree(iteration)
    with pytest.raises(FileNotFoundError, match="names iter_0000003"):
        bridge.load_megatron_model(copy)
    (copy / TRACKER).write_text("release")
    assert len(bridge.load_megatron_model(copy)) == 1


def test_what_megatron_lm_saved_into_a_folder_of_its_own_is_exported(release, hf_model, tmp_path):
    elsewhere = tmp_path / "saved" / "iter_0000003"
    shutil.copytree(release / "release", elsewhere, ignore=shutil.ignore_patterns("run_config.yaml", "tokenizer"))
    (elsewhere.parent / TRACKER).write_text("3")
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(elsewhere.parent, tmp_path / "exported")
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
        for path in (hf_model, tmp_path / "exported")
    )
    assert_same_weights(before, after)


# --- Bridge's own training ---------------------------------------------------------------------------------------


@pytest.fixture
def training(hf_model, gloo):
    """A model with other weights, and the state of a Bridge training that is about to load a checkpoint."""
    provider = AutoBridge.from_hf_pretrained(hf_model).to_megatron_provider(load_weights=False)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    init_num_microbatches_calculator(0, None, 1, 1, 1, False)

    def load(**paths):
        state = GlobalState()
        given = {key: str(path) for key, path in paths.items()}
        state.cfg = ConfigContainer(
            **dict.fromkeys(("train", "ddp", "scheduler", "dataset", "tokenizer", "dist")),
            checkpoint=CheckpointConfig(ckpt_format="torch_dist", **given),
            model=provider,
            logger=LoggerConfig(),
            optimizer=OptimizerConfig(use_distributed_optimizer=False),
        )
        iteration, _ = checkpointing.load_checkpoint(state, model, None, None)
        return iteration, model[0].embedding.word_embeddings.weight

    yield load
    unset_num_microbatches_calculator()


@pytest.mark.parametrize("key", ["pretrained_checkpoint", "load"])
def test_load_checkpoint_starts_from_a_release(training, readable, release, key):
    iteration, embedding = training(**{key: readable})
    assert iteration == 0
    assert torch.equal(embedding, weights(release / "release")["embedding.word_embeddings.weight"])


def test_load_checkpoint_believes_the_tracker_over_a_stale_train_state(training, hf_model, tmp_path, release, gloo):
    AutoBridge.import_ckpt(hf_model, tmp_path, release=False)
    shutil.copytree(release / "release", tmp_path / "release")
    shutil.rmtree(tmp_path / "iter_0000000")
    (tmp_path / TRACKER).write_text("release")
    assert (tmp_path / "latest_train_state.pt").exists()
    _, embedding = training(load=tmp_path)
    assert torch.equal(embedding, weights(release / "release")["embedding.word_embeddings.weight"])
