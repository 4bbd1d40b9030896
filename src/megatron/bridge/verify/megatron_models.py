# SPDX-License-Identifier: Apache-2.0
"""The two models that Megatron Core makes of a release: Megatron-LM's, from the printed flags, and Bridge's own."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.bridge.verify.without_cuda import FLAGS


def megatron_lm_model(root: Path, flags: Sequence[str], length: int) -> Any:
    """Build Megatron-LM's model, as `pretrain_gpt.py` of core 0.19 does, and load a release with its own loader.

    Args:
        root: A checkpoint root with `release/`.
        flags: What the import prints, without `--load`.
        length: Tokens that it is to read.

    Returns:
        A model in float32, ready to compute logits.
    """
    from megatron.core import parallel_state
    from megatron.core.datasets import utils
    from megatron.training import get_args
    from megatron.training.arguments import parse_and_validate_args

    utils.compile_helpers = lambda: None  # the wheel has no Makefile
    in_float32 = [flag for flag in flags if flag not in ("--bf16", "--fp16")]
    sys.argv = ["pretrain_gpt.py", f"--load={root}", *in_float32, *FLAGS, f"--seq-length={length}", *_RUN]
    parse_and_validate_args()
    args = get_args()
    # Local layers have no grouped experts, and a training that had them says so in its args.
    args.moe_grouped_gemm = False
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    return loaded_model(args)


def loaded_model(args: Namespace) -> Any:
    """Build the GPT model of Megatron-LM's args, as `pretrain_gpt.py` of core 0.19 does, and load its checkpoint."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.checkpointing import load_checkpoint

    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    builder = container.model.get_builder_cls()(container.model)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (model,) = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # what nothing loads shows
    load_checkpoint([model], None, None)
    return model.eval()


_RUN = (
    "--micro-batch-size=1",
    "--train-iters=1",
    "--lr=1e-3",
    "--no-load-optim",
    "--no-load-rng",
    "--exit-on-missing-checkpoint",
    # The model needs none. The number of its embeddings is in the args.
    "--tokenizer-type=NullTokenizer",
    "--vocab-size=1",
    "--no-use-tokenizer-model-from-checkpoint-args",
)


def bridge_model(root: Path, source: str, trust_remote_code: bool) -> Any:
    """Build Bridge's own model of a release, as an export does, in float32.

    Args:
        root: A checkpoint root with `release/`.
        source: The Hugging Face model.
        trust_remote_code: Whether its code may run.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.host import settings

    # `answer_for_cuda` has given the norms what a conversion does without.
    settings._WITHOUT_TRANSFORMER_ENGINE.pop("layernorm_zero_centered_gamma", None)
    bridge = AutoBridge.from_hf_pretrained(source, trust_remote_code=trust_remote_code)
    in_float32: Any = {"bf16": False, "fp16": False, "params_dtype": torch.float32, "autocast_dtype": torch.float32}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    (model,) = bridge.load_megatron_model(root, mp_overrides=in_float32, wrap_with_ddp=False)
    return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of a GPT model of Megatron Core, `[sequences, tokens, vocabulary with padding]`."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    with torch.inference_mode():
        return model(tokens, positions, torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)).float()
