# SPDX-License-Identifier: Apache-2.0
"""A function can run in a process of its own that has stand-ins for Transformer Engine."""

from fork.change import Change


change = Change(
    name="own-process",
    message="""\
feat(model): run a conversion in a process with the stand-ins

Megatron Core decides when it is imported whether there is a Transformer
Engine, and a script that calls AutoBridge has imported it.

Start a process that installs the stand-ins first, and pass on its output,
logs, warnings, and errors. It needs no __main__ guard, and ends with the
calling process.
""",
    why="A conversion that needs the stand-ins runs in a process that has imported Megatron Core after them.",
    modules=["host/own_process.py"],
    issues=[3295],
    stands_on=["stand-ins"],
    problem=(
        "Stand-ins for Transformer Engine must be there before Megatron Core is imported, and a script that calls "
        "`AutoBridge.import_ckpt` has imported it."
    ),
    changes=["Nothing yet: `layout-families` uses it."],
    unchanged=["No existing file changes."],
    tested=["Output, logs, warnings, errors, a killed process, and arguments that can't be pickled or read."],
    tests={"tests/unit/bridge/host/test_own_process.py": "host/"},
)
