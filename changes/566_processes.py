# SPDX-License-Identifier: Apache-2.0
"""A function runs in several processes of one host, which form a process group."""

from fork.change import Change


change = Change(
    name="processes",
    message="""\
feat(ckpt): run a function in several processes of a host

A conversion on one host takes several processes without torchrun: they are
forked from a server that has imported what they need, form a gloo group, and
end together. One of them says what failed. On a host with GPUs they use none.
""",
    why="Several processes of one host share a conversion, and end together.",
    modules=["host/processes.py"],
    stands_on=["accelerator", "lazy-models"],
    problem=(
        "Several processes convert faster than one where the disk allows, and torchrun starts them with a page of "
        "output on each error. A command should start them itself, and report an error in one line."
    ),
    changes=["Nothing yet: `command-import` uses it."],
    unchanged=["No existing file changes."],
    tested=["Kills of a process and of the caller, errors of one and of all, interrupts."],
    tests={"tests/unit/bridge/host/test_processes.py": "host/"},
)
