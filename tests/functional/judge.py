# SPDX-License-Identifier: Apache-2.0
"""The judge of an import: Megatron-LM's logits, from the printed flags, beside transformers' in float32.

One process answers for many models, because its start takes longer than a model. It builds each as `pretrain_gpt.py`
of core 0.19 does, through Megatron-LM's own parser, `load_args_from_checkpoint`, GPT builder and `load_checkpoint`.
Of Bridge it takes what needs no Bridge: the calls that build and load the model from args, and what Megatron Core's
local layers can't compute.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steps


LENGTH = 96  # more than any window or original length of the variants


class Judge:
    """A process that answers how far Megatron-LM's logits are from transformers'.

    Args:
        log: Where what packages print goes.
    """

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                steps.launch(Path(__file__)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=steps.environment(),
                start_new_session=True,
            )

    def ask(self, source: Path, release: Path, flags: Sequence[str]) -> float:
        """Return the largest difference of the logits, as a part of the largest logit.

        Args:
            source: The Hugging Face checkpoint.
            release: The root that was imported.
            flags: What the import printed, without `--load`.

        Raises:
            StepFailed: Megatron-LM did not start with these flags, or did not load the release.
        """
        # The process itself takes the emulation for a device.
        flags = [*steps.host().flags(), *(flag for flag in flags if flag not in ("--bf16", "--fp16"))]
        self.process.stdin.write(json.dumps([str(source), str(release), flags]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "{}")
        if "apart" not in answer:
            raise steps.StepFailed(answer.get("error") or f"ended: {steps.last_error(self.log)}", self.log)
        return answer["apart"]

    def end(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def answer_questions() -> None:
    """Answer each line of JSON on stdin with a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not stand between the answers
    import cuda_emulation

    cuda_emulation.install()
    from megatron.bridge.verify.without_cuda import let_local_layers_compute_all

    let_local_layers_compute_all()
    import traceback

    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"apart": apart(*json.loads(line))}
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def apart(source: str, release: str, flags: list[str]) -> float:
    """Compute both models' logits on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron.bridge.verify.megatron_models import logits

    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    shape = (2, LENGTH)
    tokens = torch.randint(3, network.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = network(tokens, use_cache=False).logits.float()
    found = logits(megatron_model(source, release, flags), tokens)[..., : exact.shape[-1]]
    largest = ((found - exact).abs().max() / exact.abs().max()).item()
    return largest if largest == largest else float("inf")  # NaN


def megatron_model(source: str, release: str, flags: list[str]) -> Any:
    """Build Megatron-LM's model from these flags, and load the release into it."""
    from megatron.core import parallel_state
    from megatron.core.datasets import utils
    from megatron.training import get_args, global_vars
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    from megatron.bridge.verify.megatron_models import loaded_model

    utils.compile_helpers = lambda: None  # the wheel has no Makefile
    global_vars.unset_global_variables()
    sys.argv = ["pretrain_gpt.py", f"--load={release}", *flags, f"--tokenizer-model={source}", *_RUN]
    parse_and_validate_args(args_defaults={"tokenizer_type": "HuggingFaceTokenizer"})
    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron()
    return loaded_model(get_args())


_RUN = (
    f"--seq-length={LENGTH}",
    "--micro-batch-size=1",
    "--train-iters=1",
    "--lr=1e-3",
    "--no-load-optim",
    "--no-load-rng",
    "--exit-on-missing-checkpoint",
)


if __name__ == "__main__":
    answer_questions()
