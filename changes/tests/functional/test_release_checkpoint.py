# SPDX-License-Identifier: Apache-2.0
"""What `import_ckpt` writes comes back bit for bit, and Megatron-LM fine-tunes from it on two GPUs."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron.bridge import AutoBridge


MEGATRON_LM = Path(__file__).resolve().parents[5] / "3rdparty" / "Megatron-LM"
ITERATIONS = 4
VOCABULARY = 384


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the smallest size that two tensor-parallel ranks can share, with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release checkpoint of the model."""
    root = tmp_path_factory.mktemp("release")
    AutoBridge.import_ckpt(hf_model, root)
    return root


def test_release_comes_back_bit_for_bit(hf_model: Path, release: Path, tmp_path: Path):
    assert {path.name for path in release.iterdir()} == {"release", "latest_checkpointed_iteration.txt"}
    assert (release / "latest_checkpointed_iteration.txt").read_text() == "release"
    AutoBridge.from_hf_pretrained(hf_model).export_ckpt(release, tmp_path, show_progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (hf_model, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.run_only_on("GPU")
def test_megatron_lm_trains_from_release(hf_model: Path, release: Path, tmp_path: Path):
    """With two ranks, whose padding of the vocabulary would be another without the args in the checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(MEGATRON_LM / "pretrain_gpt.py"), "--load", str(release), "--save", str(tmp_path / "trained")]
    # All that is said about the model; the rest comes from the checkpoint.
    command += ["--use-checkpoint-args", "--norm-epsilon=1e-05", "--tensor-model-parallel-size=2"]
    command += ["--mock-data", "--tokenizer-type=NullTokenizer", f"--vocab-size={VOCABULARY - 1}", "--seq-length=256"]
    command += [
        "--max-position-embeddings=256",
        "--micro-batch-size=1",
        "--global-batch-size=2",
        "--bf16",
        "--lr=1e-4",
    ]
    command += [f"--train-iters={ITERATIONS}", f"--save-interval={ITERATIONS}", "--log-interval=1"]
    command += ["--eval-iters=1", "--num-workers=0"]
    done = subprocess.run(command, cwd=MEGATRON_LM, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    losses = [float(each) for each in re.findall(r"lm loss: (\S+)", done.stdout)]
    assert len(losses) >= ITERATIONS and all(map(math.isfinite, losses)), done.stdout[-4000:]
    assert (tmp_path / "trained" / "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)
