# SPDX-License-Identifier: Apache-2.0
"""Who can load a checkpoint."""

from fork.change import Change


change = Change(
    name="verdicts",
    message="""\
feat(ckpt): tell which Megatron-LM loads a checkpoint

Keep the rules of Megatron-LM, core 0.12 to 0.19, as data, and judge a
checkpoint by them.
""",
    why="Which Megatron-LM loads a checkpoint is told without starting it.",
    modules=["release_checkpoint/verdicts.py"],
    stands_on=["examine", "launch-flags"],
    problem=(
        "The series of Megatron-LM differ in what they read, and each has its own error for a checkpoint that it "
        "can't load, such as `KeyError: 'args'`."
    ),
    changes=["A new module, `megatron.bridge.release_checkpoint.verdicts`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Each verdict was compared with that series of Megatron-LM itself, on the CPU."],
    tests={"tests/unit/bridge/release_checkpoint/test_verdicts.py": "release_checkpoint/"},
)
