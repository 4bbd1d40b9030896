# SPDX-License-Identifier: Apache-2.0
"""A repair makes a release checkpoint in place."""

from fork.change import Change


change = Change(
    name="repair",
    message="""\
feat(ckpt): repair a checkpoint in place

Plan the steps from what is there and carry them out under the lock of an
import, so that a killed repair is completed by the next one.
""",
    why="A checkpoint is repaired in place.",
    modules=["repair/repair.py"],
    stands_on=["repair-state"],
    problem=(
        "Megatron-LM can't fine-tune from a checkpoint that `import_ckpt` wrote before, and importing a large model "
        "again takes hours."
    ),
    changes=["`plan(root)` and `run(plan)` of `megatron.bridge.repair.repair`."],
    unchanged=["Nothing that exists is touched."],
    tested=[
        "A kill and an error of the system at each change, in each of some 50 states; Megatron-LM trains from the result."
    ],
    later=["The subcommand `repair` stands on this."],
    tests={"tests/unit/bridge/release_checkpoint/test_repair.py": "release_checkpoint/"},
)
