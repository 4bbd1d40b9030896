# SPDX-License-Identifier: Apache-2.0
"""The judge of an import: Megatron-LM's logits, from the printed flags, beside transformers' in float32.

One process answers for many models, because its start takes longer than a model. It builds each as `pretrain_gpt.py`
of core 0.19 does, through Megatron-LM's own parser, `load_args_from_checkpoint`, GPT builder and `load_checkpoint`.
It knows nothing of Bridge.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import wraps
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
    _let_attention_take_head_sizes()
    _let_norms_be_zero_centered()
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

    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    shape = (2, LENGTH)
    tokens = torch.randint(3, network.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = network(tokens).logits.float()
        found = megatron_model(source, release, flags)(
            tokens,
            torch.arange(LENGTH).expand_as(tokens),
            torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
        ).float()[..., : exact.shape[-1]]
    largest = ((found - exact).abs().max() / exact.abs().max()).item()
    return largest if largest == largest else float("inf")  # NaN


def megatron_model(source: str, release: str, flags: list[str]) -> Any:
    """Build Megatron-LM's model from these flags, and load the release into it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.datasets import utils
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, global_vars
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    utils.compile_helpers = lambda: None  # the wheel has no Makefile
    global_vars.unset_global_variables()
    sys.argv = ["pretrain_gpt.py", f"--load={release}", *flags, f"--tokenizer-model={source}", *_RUN]
    parse_and_validate_args(args_defaults={"tokenizer_type": "HuggingFaceTokenizer"})
    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron()
    args = get_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    builder = container.model.get_builder_cls()(container.model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # what nothing loads shows
    load_checkpoint([model], None, None)
    return model.eval()


_RUN = (
    f"--seq-length={LENGTH}",
    "--micro-batch-size=1",
    "--train-iters=1",
    "--lr=1e-3",
    "--no-load-optim",
    "--no-load-rng",
    "--exit-on-missing-checkpoint",
)


def _let_attention_take_head_sizes() -> None:
    """Give Megatron Core's local attention what Transformer Engine's has: the head sizes of latent attention.

    It computes with values of any size, but has no argument for it, and shapes what it returns by `kv_channels`
    (`megatron/core/transformer/dot_product_attention.py`, `DotProductAttention`, core 0.19.2).
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    initialize = DotProductAttention.__init__

    @wraps(initialize)
    def with_head_sizes(
        self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        initialize(self, *args, **kwargs)
        if v_channels:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = with_head_sizes


def _let_norms_be_zero_centered() -> None:
    """Give PyTorch's norms what Transformer Engine's have: a weight that is added to 1.

    Megatron Core's wrapper refuses it (`megatron/core/transformer/torch_norm.py`, `WrappedTorchNorm`, core 0.19.2).
    """
    import torch
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class RMSNorm(torch.nn.RMSNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(hidden, self.normalized_shape, self.weight + 1, self.eps)

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            weight = self.weight + 1
            return torch.nn.functional.layer_norm(hidden, self.normalized_shape, weight, self.bias, self.eps)

    refusing = WrappedTorchNorm.__new__

    def norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        if not config.layernorm_zero_centered_gamma:
            return refusing(cls, config, hidden_size, eps=eps, **kwargs)
        kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
        return kind(hidden_size, eps=eps)

    WrappedTorchNorm.__new__ = norm


if __name__ == "__main__":
    answer_questions()
