# SPDX-License-Identifier: Apache-2.0
"""The common state of a payload, in its two forms."""

from fork.change import Change


change = Change(
    name="common-state-forms",
    message="""\
feat(ckpt): read both forms of the common state without torch

Megatron Core up to 0.18 writes common.pt and core 0.19 an entry. Read what
is there, and say in what the two differ.
""",
    why="Both forms of the common state are read without torch.",
    modules=["release_checkpoint/state.py"],
    stands_on=["metadata"],
    problem="A checkpoint may have its common state twice, with different content, and one of the two may be damaged.",
    changes=["A new module, `megatron.bridge.release_checkpoint.state`, which nothing uses yet."],
    unchanged=["Nothing that exists is touched."],
    tested=["Unit tests on states that PyTorch wrote, on damaged files, and on pickles that nest without end."],
    tests={
        "tests/unit/conftest.py": "release_checkpoint/",
        "tests/unit/bridge/release_checkpoint/test_state.py": "release_checkpoint/",
    },
)
