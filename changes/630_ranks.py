# SPDX-License-Identifier: Apache-2.0
"""The weights of the whole model in the files of all ranks."""

from fork.change import Change


change = Change(
    name="ranks",
    message="""\
feat(ckpt): find the weights of a model in the files of its ranks

Say which parts of which files of `--ckpt-format torch` make each tensor of
the whole model, for tensor, pipeline, interleaved and expert parallelism.
""",
    why="The files of all ranks of --ckpt-format torch are put together to one model.",
    modules=["release_checkpoint/ranks.py"],
    limit=600,
    limit_reason="The rules of the five kinds of parallelism belong together, and the test splits a model by all of them.",
    stands_on=["rank-files", "common-state-forms"],
    problem=(
        "Checkpoints of `--ckpt-format torch` (`mp_rank_00_000/model_optim_rng.pt`) can't be exported: Bridge reads distributed "
        "checkpoints only."
    ),
    changes=["A new module, `megatron.bridge.release_checkpoint.ranks`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=[
        "A model is split over ranks by each kind of parallelism and several together, and comes back bit for bit."
    ],
    tests={
        "tests/unit/bridge/test_ranks.py": "release_checkpoint/",
        "tests/unit/bridge/rank_checkpoints.py": "release_checkpoint/",
    },
)
