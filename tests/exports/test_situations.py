# SPDX-License-Identifier: Apache-2.0
"""What Megatron-LM was trained as is what an export computes, or the export is refused in one line: `nox -s exports`.

A row changes Megatron-LM's flags. Its checkpoint is exported onto the Hugging Face model of the family, which has the
values without the change, and by its args alone. transformers' logits of each export are Megatron-LM's.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import steps
import torch
from transformers import AutoModelForCausalLM

from megatron.bridge import AutoBridge


NEAR = 1e-4  # of the largest logit
FLAGS: dict[str, Any] = {
    "num-layers": 4,
    "hidden-size": 64,
    "ffn-hidden-size": 128,
    "num-attention-heads": 4,
    "kv-channels": 16,
    "group-query-attention": True,
    "num-query-groups": 2,
    "max-position-embeddings": 512,
    "position-embedding-type": "rope",
    "rotary-base": 500000,
    "rotary-percent": 1.0,
    "norm-epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "attention-dropout": 0,
    "untie-embeddings-and-output-weights": True,
    "hidden-dropout": 0,
}
SCALED = {"use-rope-scaling": True, "rope-scaling-factor": 8.0, "max-position-embeddings": 131072}
TIED = {"untie-embeddings-and-output-weights": False}
WINDOW = {"window-size": "7,0"}
QWEN2 = {"add-qkv-bias": True, "rotary-base": 1000000, "norm-epsilon": 1e-6}
QWEN3 = {"qk-layernorm": True, "kv-channels": 32, "rotary-base": 1000000, "norm-epsilon": 1e-6}
EXPERTS = {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 32, "moe-router-load-balancing-type": "none"}
MOE = QWEN3 | EXPERTS
DEEPSEEK = EXPERTS | {
    "multi-latent-attention": True,
    "q-lora-rank": 32,
    "kv-lora-rank": 32,
    "qk-head-dim": 16,
    "v-head-dim": 16,
    "qk-pos-emb-head-dim": 16,
    "kv-channels": False,
    "group-query-attention": False,
    "num-query-groups": False,
    "rope-type": "rope",
    "rotary-base": 10000,
    "norm-epsilon": 1e-6,
    "qk-layernorm": True,
    "moe-layer-freq": "[0,1,1,1]",
    "moe-router-score-function": "sigmoid",
    "moe-router-enable-expert-bias": True,
    "moe-router-topk-scaling-factor": 2.5,
    "moe-router-num-groups": 1,
    "moe-router-group-topk": 1,
    "moe-shared-expert-intermediate-size": 32,
}
SAME = "same"
# name: (family, changes of the flags, what the export is: "same", or a part of the error; the same by the args alone)
ROWS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "as it is": ("llama-3", {}, SAME, SAME),
    "rotary base": ("llama-3", {"rotary-base": 20000}, SAME, SAME),
    "norm epsilon": ("llama-3", {"norm-epsilon": 1e-2}, SAME, SAME),
    "linear scaling": ("llama-3", {"rotary-seq-len-interpolation-factor": 4}, SAME, SAME),
    "a scaling that is new": ("llama-3", SCALED, SAME, SAME),
    "a scaling that was forgotten": ("llama-3.1", {"max-position-embeddings": 131072}, SAME, SAME),
    "partial rotary": ("llama-3", {"rotary-percent": 0.5}, "rope is", "rope is"),
    "learned positions": ("llama-3", {"position-embedding-type": "learned_absolute"}, "learned_abs", "learned_abs"),
    "a head of its own": ("llama-3.2", SCALED | {"rope-scaling-factor": 8.0}, SAME, SAME),
    "a tied head": ("llama-3", TIED, SAME, SAME),
    "one group": ("llama-3", {"num-query-groups": 1}, SAME, SAME),
    "other heads": ("llama-3", {"num-attention-heads": 8, "kv-channels": 8}, SAME, SAME),
    "fewer layers": ("llama-3", {"num-layers": 2}, SAME, SAME),
    "another width": ("llama-3", {"hidden-size": 32, "kv-channels": 8, "ffn-hidden-size": 96}, SAME, SAME),
    "a longer context": ("llama-3", {"max-position-embeddings": 1024}, SAME, SAME),
    "a window onto Llama": ("llama-3", WINDOW, "windows is", SAME),
    "a window onto Mistral": ("mistral", WINDOW | {"rotary-base": 1000000}, SAME, SAME),
    "a window of later tokens": ("mistral", {"window-size": "7,7"}, "windows is [[7, 7]", "windows is [[7, 7]"),
    "a head size onto Qwen2": ("qwen2", QWEN2 | {"kv-channels": 24}, SAME, SAME),
    "routers at random": ("qwen3-moe", MOE | {"moe-router-force-load-balancing": True}, "force_load", "force_load"),
    "Sinkhorn's routers": (
        "qwen3-moe",
        MOE | {"moe-router-load-balancing-type": "sinkhorn"},
        "sinkhorn is True",
        "sinkhorn is True",
    ),
    "windows by layer": ("qwen2", QWEN2 | WINDOW | {"window-attn-skip-freq": 2}, SAME, SAME),
    "GELU": ("llama-3", {"swiglu": False}, "activation is 'another'", "activation is 'another'"),
    "biases": ("llama-3", {"disable-bias-linear": False}, SAME, SAME),
    "biases of QKV onto Llama": ("llama-3", {"add-qkv-bias": True}, "attention_bias is True", SAME),
    "norms of queries and keys onto Llama": ("llama-3", {"qk-layernorm": True}, "qk_layernorm is True", SAME),
    "LayerNorm": ("llama-3", {"normalization": "LayerNorm"}, "normalization is", "normalization is"),
    "off-by-one softmax": ("llama-3", {"softmax-type": "off-by-one"}, "softmax_type is", "softmax_type is"),
    "prediction layers": ("llama-3", {"mtp-num-layers": 1}, "mtp_num_layers is 1", "mtp_num_layers is 1"),
    "a vocabulary that is padded": ("llama-3", {"make-vocab-size-divisible-by": 512}, SAME, SAME),
    "experts": ("qwen3-moe", MOE, SAME, SAME),
    "more experts": ("qwen3-moe", MOE | {"num-experts": 8, "moe-ffn-hidden-size": 48}, SAME, SAME),
    "a router without normalization": ("qwen3-moe", MOE | {"moe-router-pre-softmax": True}, SAME, SAME),
    "dense layers": ("qwen3-moe", MOE | {"moe-layer-freq": "[0,1,1,1]"}, SAME, SAME),
    "sigmoids onto Qwen": ("qwen3-moe", MOE | {"moe-router-score-function": "sigmoid"}, "sigmoid", "sigmoid"),
    "experts onto a dense model": ("qwen3", MOE, "num_experts is 4", SAME),
    "a dense model onto experts": ("qwen3-moe", QWEN3, "num_experts is None", SAME),
    "latent attention": ("deepseek-v3", DEEPSEEK, SAME, SAME),
    "groups of experts": ("deepseek-v3", DEEPSEEK | {"moe-router-num-groups": 2}, SAME, SAME),
    "another latent attention": ("deepseek-v3", DEEPSEEK | {"kv-lora-rank": 16, "qk-head-dim": 24}, SAME, SAME),
    "experts in each layer": ("deepseek-v3", DEEPSEEK | {"moe-layer-freq": 1}, SAME, SAME),
    "more latent heads": ("deepseek-v3", DEEPSEEK | {"num-attention-heads": 8}, SAME, SAME),
    "two dense layers": ("deepseek-v3", DEEPSEEK | {"moe-layer-freq": "[0,0,1,1]"}, SAME, SAME),
    "softmaxes onto DeepSeek": (
        "deepseek-v3",
        DEEPSEEK | {"moe-router-score-function": "softmax", "moe-router-enable-expert-bias": False},
        "score_function is 'softmax'",
        "is the model of",
    ),
}


@pytest.fixture(scope="module")
def megatron_lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    """Start Megatron-LM once for all rows."""
    with (tmp_path_factory.mktemp("log") / "trained.txt").open("w") as log:
        process = subprocess.Popen(
            steps.launch(Path(__file__).with_name("trained.py")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=steps.environment(),
            start_new_session=True,
        )
        yield process
        process.stdin.close()
        os.killpg(process.pid, signal.SIGKILL)  # it forks writers, which outlive it
        process.wait()


def words(changes: dict[str, Any]) -> Iterator[str]:
    """Yield the flags, with their values."""
    for name, value in (FLAGS | changes).items():
        if value is not False:
            yield f"--{name}" if value is True else f"--{name}={value}"


def check(bridge: AutoBridge, root: Path, out: Path, expected: str, **options: Any) -> None:
    """Export, and compare the logits with Megatron-LM's, or the error with what is expected."""
    if expected != SAME:
        with pytest.raises(ValueError) as error:
            bridge.export_ckpt(root, out, show_progress=False, **options)
        assert expected in str(error.value) and "\n" not in str(error.value)
        assert not out.exists()
        return
    bridge.export_ckpt(root, out, show_progress=False, **options)
    network = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    megatron = torch.load(root / "logits.pt")
    with torch.inference_mode():
        found = network(megatron["tokens"]).logits
    expected_logits = megatron["logits"][..., : found.shape[-1]]
    assert ((found - expected_logits).abs().max() / expected_logits.abs().max()).item() < NEAR


@pytest.mark.parametrize(("family", "changes", "onto", "alone"), ROWS.values(), ids=ROWS)
def test_an_export_computes_what_was_trained_or_is_refused(
    tmp_path: Path, megatron_lm: subprocess.Popen, family: str, changes: dict[str, Any], onto: str, alone: str
) -> None:
    """Onto the model of the family, and by the args alone."""
    source, root = models.make_model(tmp_path / "hf", family), tmp_path / "root"
    question = [str(source), str(root), [*steps.host().flags(), *words(changes)]]
    megatron_lm.stdin.write(json.dumps(question) + "\n")
    megatron_lm.stdin.flush()
    assert json.loads(megatron_lm.stdout.readline() or '{"error": "it ended"}') == {}
    check(AutoBridge.from_hf_pretrained(source), root, tmp_path / "onto", onto, source_path=source)
    if alone != SAME:
        with pytest.raises(ValueError) as error:
            AutoBridge.from_megatron_args(root)
        assert alone in str(error.value) and "\n" not in str(error.value)
        return
    check(AutoBridge.from_megatron_args(root), root, tmp_path / "alone", alone)
