# SPDX-License-Identifier: Apache-2.0
"""The common state of a release in the form of every Megatron Core: `common.pt`, and an entry of the checkpoint."""

from fork.change import Change
from fork.edits import File, add_import, call, insert_before


change = Change(
    name="common-state",
    message="""\
fix(ckpt): write a release that every Megatron Core and PyTorch reads

Megatron Core 0.19 writes the common state as an entry of the checkpoint.
Cores up to 0.18 look for `common.pt` alone, and stop at a release that core
0.19 has written. PyTorch 2.15 writes strides into `.metadata`, at which
earlier versions stop.

Write the common state in both forms, the file from the entry, and leave the
strides out.
""",
    why="A release checkpoint loads in every Megatron Core from 0.12 on, whichever PyTorch has written it.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.training.common_state import write_common_pt"),
                insert_before(
                    "save_checkpoint._post_save_global_barrier",
                    call("writer.publish"),
                    "writer.run(write_common_pt, writer.payload)",
                ),
            ],
        )
    ],
    modules=["training/common_state.py"],
    stands_on=["release-checkpoints"],
    problem=(
        "Megatron-LM up to core 0.18 can't load a release checkpoint that Megatron Core 0.19 wrote: `pretrain_gpt.py "
        "--load out` looks for `common.pt`, which core 0.19 no longer writes. A checkpoint that PyTorch 2.15 wrote "
        "can't be loaded with an earlier PyTorch, because its `.metadata` has strides."
    ),
    changes=[
        "A release checkpoint also has `common.pt`, with the content of the entry `common_state`.",
        "Its `.metadata` has no strides of tensors, which are contiguous.",
    ],
    unchanged=["Checkpoints of a training. Core 0.19 reads a release as before: it looks for the file first."],
    tested=[
        "Megatron Core 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18, and 0.19 load the same release checkpoint.",
    ],
    tests={"tests/unit/bridge/test_common_state.py": "training/"},
)
