# SPDX-License-Identifier: Apache-2.0
"""A release checkpoint from a model that is sharded over two ranks, and over MultiStorageClient."""

import os
import subprocess
import sys

import pytest
from test_object_store_writer import object_store  # noqa: F401 - a fixture
from tiny_models import PAYLOAD, assert_same_weights, names, save_hf_model, weights

from megatron.bridge import AutoBridge
from megatron.bridge.release_checkpoint.layout import TRACKER
from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args


# Run by each rank. Saves the model sharded by tensor parallelism, then tries to overwrite a training checkpoint.
SAVE_SHARDED = """
import json, sys
import torch
from megatron.bridge import AutoBridge

hf_model, out, training = sys.argv[1:]
torch.distributed.init_process_group("gloo")
bridge = AutoBridge.from_hf_pretrained(hf_model)
provider = bridge.to_megatron_provider()
provider.tensor_model_parallel_size = 2
provider.finalize()
provider.initialize_model_parallel(seed=0)
model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
bridge.save_megatron_model(model, out, hf_tokenizer_path=hf_model, release=True)
try:
    bridge.save_megatron_model(model, training, release=True)
except FileExistsError as error:
    print("REFUSED", str(error))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    return save_hf_model(tmp_path_factory.mktemp("hf"))


def test_two_ranks_write_one_release_and_refuse_together(hf_model, tmp_path):
    training = tmp_path / "training"
    (training / "iter_0000006").mkdir(parents=True)
    script = tmp_path / "save_sharded.py"
    script.write_text(SAVE_SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.run(
        [*command, str(hf_model), str(tmp_path / "out"), str(training)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("REFUSED") == 2
    assert {path.name for path in training.iterdir()} == {"iter_0000006"}

    AutoBridge.import_ckpt(hf_model, tmp_path / "single")
    assert names(tmp_path / "out/release") == PAYLOAD | {"__1_0.distcp"}
    assert (tmp_path / "out" / TRACKER).read_text() == "release"
    assert_same_weights(weights(tmp_path / "out/release"), weights(tmp_path / "single/release"))
    args, single = (vars(read_megatron_lm_args(tmp_path / root)) for root in ("out", "single"))
    different = {key for key in args if args[key] != single[key]}
    assert different == {"tensor_model_parallel_size", "world_size"}


def test_a_release_is_written_to_an_object_store(hf_model, tmp_path, object_store):  # noqa: F811
    url, folder = object_store
    AutoBridge.import_ckpt(hf_model, url)
    assert {path.name for path in folder.iterdir()} == {"release", TRACKER}
    assert (folder / TRACKER).read_text() == "release"
    assert (folder / "release/common.pt").is_file()
    AutoBridge.import_ckpt(hf_model, tmp_path / "local")
    assert_same_weights(weights(folder / "release"), weights(tmp_path / "local/release"))
    assert AutoBridge.get_hf_model_id_from_checkpoint(url) == str(hf_model)
