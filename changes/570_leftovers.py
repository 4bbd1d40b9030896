# SPDX-License-Identifier: Apache-2.0
"""What killed imports left is removed, what isn't theirs stays, and of two imports at once the second is refused."""

from fork.change import Change
from fork.edits import File, add_import, expression, insert_after


change = Change(
    name="leftovers",
    message="""\
fix(ckpt): remove what killed imports left, and nothing else

A killed import leaves its staging folder, which is as large as the model.

The next import removes it, if the file in it says that Bridge made it and no
process holds its lock. Anything else of such a name is reported and stays.
The second of two imports into one root is refused.
""",
    why="A staging folder is removed only if a killed process of Bridge left it.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.release_checkpoint import leftovers"),
                insert_after(
                    "save_checkpoint", expression("writer.stage()"), "writer.run(leftovers.clear, checkpoint_name)"
                ),
            ],
        )
    ],
    modules=["release_checkpoint/leftovers.py"],
    stands_on=["object-stores"],
    problem="An import that is killed leaves a staging folder as large as the model, which nothing removes.",
    changes=[
        "An import removes the staging folders of killed imports into the same root, and refuses to run beside another one.",
    ],
    unchanged=["File systems without locks, and folders of other hosts: what is found there is named and stays."],
    tested=["Unit tests; processes that were killed at each change to the file system."],
    tests={"tests/unit/bridge/test_leftovers.py": "release_checkpoint/"},
)
