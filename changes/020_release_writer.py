# SPDX-License-Identifier: Apache-2.0
"""The writer of release checkpoints: stages the payload beside the old one, and publishes or discards it."""

from fork.change import Change


change = Change(
    name="release-writer",
    message="""\
feat(ckpt): add a writer that publishes a release checkpoint in one step

A save that was interrupted left a folder that looks like a checkpoint, or a
tracker that names one that isn't whole.

`ReleaseWriter` stages the payload in a folder of its own, renames it into
place and writes the tracker last. A block that raises leaves nothing
behind; a crash leaves the old checkpoint or none. A root that holds
training iterations is refused, also if a training saves there meanwhile.
""",
    why="A release checkpoint is staged, and then published or discarded, by one object.",
    modules=["release_checkpoint/files.py", "training/release_writer.py"],
    stands_on=["resolver"],
    problem=(
        "`AutoBridge.import_ckpt(hf_model, out)` that is killed leaves a folder that looks like a checkpoint, or a tracker "
        "that names an incomplete one. The next training loads it, or fails hours later."
    ),
    changes=[
        "Nothing yet. `ReleaseWriter` writes `release/` and its tracker, whole or not at all, on one rank or many."
    ],
    unchanged=["What Bridge writes: nothing uses the writer before the change `release-checkpoints`."],
    tested=[
        "Unit tests. A process that was killed at each change to the file system left the old checkpoint, the new one, "
        "or none."
    ],
    later=["Object stores, which can't rename folders: `object-stores`."],
    tests={"tests/unit/bridge/test_release_writer.py": "training/"},
)
