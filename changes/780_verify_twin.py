# SPDX-License-Identifier: Apache-2.0
"""Twins: small models with the config of a large one, in which an error of the conversion shows."""

from fork.change import Change


change = Change(
    name="verify-twin",
    message="""\
feat(ckpt): make small twins of large models

A model that doesn't fit in memory can't be compared with transformers.

Make a twin of it: a model with the same config, but few layers and small
widths. Its random weights are scaled so that a wrong position or a wrong
expert moves the logits.
""",
    why="A model of any size is proved by a twin that takes seconds and no memory.",
    modules=["verify/memory.py", "verify/twin.py"],
    problem=(
        "Comparing the logits of an imported model with those of transformers takes twice the memory of the model, "
        "so large models can't be compared at all. A small model with the usual random weights is no substitute: its "
        "logits hardly move when a layer is wrong."
    ),
    changes=[
        "Nothing yet. `command-verify` uses the twins.",
    ],
    unchanged=[
        "No existing file changes.",
    ],
    tested=[
        "Twins of the configs of published models, on the CPU, with layer patterns, sliding windows, and groups "
        "of experts.",
    ],
    later=[
        "The process that compares a twin follows in `verify-process`.",
    ],
    tests={"tests/unit/bridge/test_verify_twin.py": "verify/"},
    stands_on=["verify-models"],
)
