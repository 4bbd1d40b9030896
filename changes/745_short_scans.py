# SPDX-License-Identifier: Apache-2.0
"""`import transformers` reads less in a process of the command."""

from fork.change import Change


change = Change(
    name="short-scans",
    message="""\
perf: let transformers read its models once at import

`import transformers` reads the names of the files of every installed
distribution, to know the versions of a few, and reads the modules of its 400
models twice. Together this takes half a second.

Let it read the models once, and only the distributions that it asks about. A
second module lets a package wait until one of its names is used. The command
megatron-bridge will use both in its own process.
""",
    why="A conversion starts half a second earlier.",
    modules=["utils/deferred_package.py", "utils/deferred_scans.py"],
    problem="""\
`python -X importtime -c "import transformers"` shows half a second in two modules of transformers, which read the lists of
files of all installed distributions, and the modules of 400 models twice. A process that converts one model pays for that.
""",
    changes=["A module that shortens both, and one that defers a package. Nothing uses them yet."],
    unchanged=["`import transformers` in other processes."],
    tested=["transformers has the same models and finds the same versions."],
    tests={"tests/unit/bridge/test_deferred_scans.py": "utils/"},
)
