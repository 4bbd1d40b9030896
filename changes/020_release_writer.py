# SPDX-License-Identifier: Apache-2.0
"""The writer of release checkpoints: stages the payload beside the old one, and publishes or discards it."""

from fork.change import Change


change = Change(
    name="release-writer",
    message="""\
feat(ckpt): add a writer that publishes a release checkpoint in one step

An interrupted save left a folder that looks like a checkpoint, or a tracker
that names an incomplete one.

`ReleaseWriter` stages the payload in a folder of its own, renames it into
place, and writes the tracker last. After an error, nothing is left. After a
crash, the old checkpoint is there, or none. A root that holds training
iterations is refused, even if a training saves them during the import.
""",
    why="A release checkpoint is staged, and then published or discarded, by one object.",
    modules=["release_checkpoint/files.py", "training/release_writer.py"],
    stands_on=["resolver"],
    problem=(
        "If `AutoBridge.import_ckpt(hf_model, out)` is killed, it leaves a folder that looks like a checkpoint, or a "
        "tracker that names an incomplete one. The next training loads it, or fails hours later."
    ),
    changes=[
        "Nothing yet. `ReleaseWriter` writes `release/` and its tracker, completely or not at all, on one rank "
        "or several.",
    ],
    unchanged=[
        "What Bridge writes. Nothing uses the writer before the change `release-checkpoints`.",
    ],
    tested=[
        "Unit tests.",
        "A process was killed at each change to the file system. It left the old checkpoint, the new one, or none.",
    ],
    later=[
        "Object stores, which can't rename folders, follow in `object-stores`.",
    ],
    tests={"tests/unit/bridge/test_release_writer.py": "training/"},
)
