# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `--ckpt-format` torch and torch_dcp are exported."""

from fork.change import Change
from fork.edits import File, insert_first


change = Change(
    name="other-formats-export",
    message="""\
feat(ckpt): export checkpoints of --ckpt-format torch and torch_dcp

An export could read the format torch_dist only.

Put the files of all ranks together, tensor by tensor, and load them into a
model on one rank. No pickle of the checkpoint is run. The format
fsdp_dtensor is refused by name.
""",
    why="Checkpoints of torch and torch_dcp are exported like those of torch_dist.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                insert_first(
                    "_load_model_weights_from_checkpoint",
                    "from megatron.bridge.models.conversion.streaming.other_formats import load_other_format\n"
                    "\n"
                    "if (loaded := load_other_format(checkpoint_path, model)) is not None:\n"
                    "    return loaded if return_state_dict else None\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/streaming/other_formats.py"],
    stands_on=["payload-facts", "checkpoint-tensors", "trained-checkpoints", "untrusted-checkpoints"],
    problem=(
        "`bridge.export_ckpt(checkpoint, hf_out)` reads the format torch_dist only. Older trainings and "
        "Megatron-LM's tools/checkpoint write `--ckpt-format torch`, with a file for each rank "
        "(`mp_rank_00_000/model_optim_rng.pt`), and trainings with FSDP2 write torch_dcp. Neither can be exported."
    ),
    changes=[
        "`export_ckpt` and `load_megatron_model` read `--ckpt-format torch`, split by tensor, pipeline (also "
        "interleaved), and expert parallelism, and torch_dcp. Both run in one process.",
        "Copies of a tensor in several files must be equal. Checkpoints in the format fsdp_dtensor are refused "
        "by name.",
    ],
    unchanged=[
        "How checkpoints in the format torch_dist are read.",
    ],
    tested=[
        "Tiny models that Megatron-LM split and saved come back bit for bit.",
    ],
    later=[
        "The format fsdp_dtensor.",
    ],
    tests={"tests/unit/bridge/test_streaming_formats.py": "models/"},
)
