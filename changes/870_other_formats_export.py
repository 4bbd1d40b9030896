# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `--ckpt-format` torch and torch_dcp are exported."""

from fork.change import Change
from fork.edits import File, insert_first


change = Change(
    name="other-formats-export",
    message="""\
feat(ckpt): export checkpoints of --ckpt-format torch and torch_dcp

Put the files of all ranks together, tensor by tensor, and load them into the
model of one rank. No pickle of them is run. Refuse fsdp_dtensor by name.
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
        "`export_ckpt` reads torch_dist only. What Megatron-LM's tools/checkpoint and older trainings have left has a file for "
        "each rank (`mp_rank_00_000/model_optim_rng.pt`), and what FSDP2 trains is torch_dcp."
    ),
    changes=[
        "`export_ckpt` and `load_megatron_model` take `--ckpt-format torch`, split by tensor, pipeline, interleaved and "
        "expert parallelism, and torch_dcp, in one process.",
        "Copies of a tensor in several files must be equal. fsdp_dtensor is refused by name.",
    ],
    unchanged=["How torch_dist is read."],
    tested=["Tiny models that Megatron-LM has split and saved come back bit for bit."],
    tests={"tests/unit/bridge/test_streaming_formats.py": "models/"},
)
