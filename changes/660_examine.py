# SPDX-License-Identifier: Apache-2.0
"""What lies at a path."""

from fork.change import Change


change = Change(
    name="examine",
    message="""\
feat(ckpt): examine what is at a path

Recognize a checkpoint root, its tracker, its payload folders, and what a
killed import left.
""",
    why="What is at a path is known from metadata alone.",
    modules=["release_checkpoint/examine.py"],
    stands_on=["leftovers", "payload-facts"],
    problem="A root may hold a tracker that names a missing folder, several payloads, or the remains of a killed import. Nothing says which.",
    changes=["A new module, `megatron.bridge.release_checkpoint.examine`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests on roots, payload folders, links and files."],
    tests={"tests/unit/bridge/release_checkpoint/test_examine.py": "release_checkpoint/"},
)
