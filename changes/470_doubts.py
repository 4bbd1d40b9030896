# SPDX-License-Identifier: Apache-2.0
"""Tells releases that were imported before imports accounted for what they read, and may be wrong."""

from fork.change import Change


change = Change(
    name="doubts",
    message="""\
feat(ckpt): recognize releases that an earlier import may have got wrong

Imports that didn't account for what they read took quantized weights for
plain ones, left out the head of a tied model that has one, and dropped keys
of config.json, such as biases and windows.

Recognize such a release checkpoint by its source, as far as small files show
it.
""",
    why="Whoever has a release checkpoint of an earlier import learns that it may hold another model than its source.",
    modules=["release_checkpoint/doubts.py"],
    problem=(
        "A release checkpoint that an earlier `AutoBridge.import_ckpt` made from a quantized checkpoint looks like "
        "any other."
    ),
    changes=["Nothing yet: `command-inspect` shows it."],
    unchanged=["No existing file changes."],
    tested=["Unit tests of each kind of source."],
    tests={"tests/unit/bridge/release_checkpoint/test_doubts.py": "release_checkpoint/"},
    stands_on=["proof"],
)
