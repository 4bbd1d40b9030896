# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `--ckpt-format torch` are exported."""

from fork.change import Change
from fork.edits import File, insert_first


change = Change(
    name="ranks-export",
    message="""\
feat(ckpt): export checkpoints of --ckpt-format torch

Put the files of all ranks together, tensor by tensor, and load them into the
model of one rank. No pickle of them is run.
""",
    why="Checkpoints with a file for each rank are exported.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                insert_first(
                    "_load_model_weights_from_checkpoint",
                    "from megatron.bridge.models.conversion.streaming.ranks import load_ranks\n"
                    "from megatron.bridge.release_checkpoint.layout import is_split\n"
                    "\n"
                    "if is_split(Path(checkpoint_path)):\n"
                    "    loaded = load_ranks(checkpoint_path, model)\n"
                    "    return loaded if return_state_dict else None\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/streaming/ranks.py"],
    stands_on=["ranks", "streaming-conversion", "trained-checkpoints"],
    problem=(
        "`export_ckpt` reads distributed checkpoints only. What Megatron-LM's tools/checkpoint and older trainings have left "
        "has a file for each rank (`mp_rank_00_000/model_optim_rng.pt`)."
    ),
    changes=[
        "`export_ckpt` and `load_megatron_model` take `--ckpt-format torch`, split by tensor, pipeline, interleaved and "
        "expert parallelism, in one process.",
        "Copies of a tensor in several files must be equal.",
    ],
    unchanged=["How distributed checkpoints are read."],
    tested=["Tiny models that Megatron-LM has split and saved come back bit for bit."],
    tests={"tests/unit/bridge/test_streaming_ranks.py": "models/"},
)
