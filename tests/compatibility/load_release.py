# SPDX-License-Identifier: Apache-2.0
"""Load a release checkpoint into a model of the Megatron Core that is first on the path, without Bridge.

    PYTHONPATH=CORE python tests/compatibility/load_release.py CHECKPOINT/release WEIGHTS.pt

The checkpoint's args describe the model: Megatron Core's `GPTModel` with its local layers, on the CPU. Model and
checkpoint must have the same weights, and each weight must equal that of the same name in WEIGHTS.pt.
"""

import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from weights import differing


# Entries of Megatron Core 0.19 for its own readers, and Transformer Engine's entries for FP8.
NO_WEIGHTS = ("common_state", "_extra_state")


def model_of(args: Namespace) -> GPTModel:
    """Build the model that a checkpoint's args describe."""
    own = {each.name: getattr(args, each.name) for each in fields(TransformerConfig) if hasattr(args, each.name)}
    swiglu = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} if args.swiglu else {}
    # The local layers have neither of the two fusions.
    config = TransformerConfig(
        **own, **swiglu, use_cpu_initialization=True, persist_layer_norm=False, bias_activation_fusion=False
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )


def load(payload: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model after it has loaded a payload.

    Raises:
        ValueError: Model and payload don't have the same weights.
    """
    args = dist_checkpointing.load_common_state_dict(str(payload))["args"]
    model = model_of(args)
    wanted = {"model": model.sharded_state_dict()}
    state, left, absent = dist_checkpointing.load(wanted, str(payload), strict=StrictHandling.RETURN_ALL)
    left = sorted(name for name in left if not name.endswith(NO_WEIGHTS))
    if absent or left:
        raise ValueError(f"the payload lacks {sorted(absent)} of the model, and the model {left} of the payload")
    model.load_state_dict(state["model"], strict=True)
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def main(payload: str, weights: str) -> None:
    """Load, and end with an error unless the model then has the weights that it should have."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if different := differing(load(Path(payload)), torch.load(weights, weights_only=True)):
        raise ValueError(f"these weights are not the source's: {different}")
    print(f"Megatron Core {megatron.core.__version__} of {Path(megatron.core.__file__).parents[2]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
