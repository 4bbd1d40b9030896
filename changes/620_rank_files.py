# SPDX-License-Identifier: Apache-2.0
"""What torch.save wrote, without torch."""

from fork.change import Change


change = Change(
    name="rank-files",
    message="""\
feat(ckpt): read what torch.save wrote without loading it

Say what a file of `torch.save` holds, and where the values of its tensors
lie, for its zip format and the one before. No class of a pickle is called.
""",
    why="A rank's file is read without memory for its tensors, and without running its pickle.",
    modules=["release_checkpoint/rank_files.py"],
    stands_on=["metadata"],
    problem=(
        "Megatron-LM's older format, `--ckpt-format torch`, has one file of `torch.save` per rank, with weights and "
        "optimizer in one pickle. `torch.load` needs the memory for all of it, and the classes that the pickle "
        "names."
    ),
    changes=["A new module, `megatron.bridge.release_checkpoint.rank_files`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Files of PyTorch in both formats: parts of a buffer, parameters, foreign classes, cut off."],
    tests={"tests/unit/bridge/release_checkpoint/test_rank_files.py": "release_checkpoint/"},
)
