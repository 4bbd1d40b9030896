# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM saves models of given flags, with random weights, and computes their logits.

One process answers for many models, because its start takes longer than a model. Each line on stdin is a JSON list:
the folder of a tokenizer, the root to save to, and flags. The logits go into `logits.pt` of the root.
"""

import json
import os
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "functional"))

LENGTH = 96  # more than any window or original length of the rows
RUN = (
    f"--seq-length={LENGTH}",
    "--micro-batch-size=1",
    "--train-iters=1",
    "--lr=1e-3",
    "--save-interval=1",
    "--no-save-optim",
    "--no-save-rng",
    "--ckpt-format=torch_dist",
)


def main() -> None:
    """Answer each line with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not stand between the answers
    import traceback

    import cuda_emulation

    cuda_emulation.install()
    from megatron.bridge.verify.without_cuda import let_local_layers_compute_all

    let_local_layers_compute_all()
    for line in sys.stdin:
        try:
            save(*json.loads(line))
            answer = {}
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def save(tokenizer: str, root: str, flags: list[str]) -> None:
    """Build the model of these flags as `pretrain_gpt.py` does, save it as iteration 2, and compute its logits."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.datasets import utils
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, global_vars
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron.bridge.verify.megatron_models import logits

    utils.compile_helpers = lambda: None  # the wheel has no Makefile
    global_vars.unset_global_variables()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    sys.argv = ["pretrain_gpt.py", f"--save={root}", f"--tokenizer-model={tokenizer}", *RUN, *flags]
    parse_and_validate_args(args_defaults={"tokenizer_type": "HuggingFaceTokenizer"})
    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron()
    args = get_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    builder = container.model.get_builder_cls()(container.model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    draw(model)
    tokens = torch.randint(3, 240, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    computed = logits(model.eval(), tokens)
    save_checkpoint(2, [model], None, None, 0)
    torch.save({"tokens": tokens, "logits": computed}, f"{root}/logits.pt")


def draw(model) -> None:
    """Fill a model with weights that tell: peaked attention, and routers that decide by a margin."""
    import torch

    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data.copy_(noise * 0.1 + ("norm" in name and "bias" not in name))
        else:
            attention = any(each in name for each in ("linear_qkv", "linear_q", "linear_kv"))
            parameter.data.copy_(noise * (1.0 if "router.weight" in name else 0.25 if attention else 0.1))
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.data.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


if __name__ == "__main__":
    main()
