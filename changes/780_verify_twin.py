# SPDX-License-Identifier: Apache-2.0
"""Twins: small models with the config of a large one, in which an error of the conversion shows."""

from fork.change import Change


change = Change(
    name="verify-twin",
    message="""\
feat(ckpt): make small twins of large models

A model that doesn't fit in memory can't be compared with transformers. Its
twin can: the same config with few layers, small widths and random weights
that are scaled so that a wrong position or a wrong expert moves the logits.
""",
    why="A model of any size is proved by a twin that takes seconds and no memory.",
    modules=["verify/memory.py", "verify/twin.py"],
    problem="A comparison of logits needs twice the memory of the model. With the usual random weights, it shows little.",
    changes=["Nothing that a user sees."],
    unchanged=["Every other module."],
    tested=["Twins of configs of published models on the CPU, with layer patterns, windows, groups of experts."],
    tests={"tests/unit/bridge/test_verify_twin.py": "verify/"},
    stands_on=["verify-models"],
)
