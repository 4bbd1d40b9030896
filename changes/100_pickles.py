# SPDX-License-Identifier: Apache-2.0
"""A pickle is loaded without running it, and without torch."""

from fork.change import Change


change = Change(
    name="pickles",
    message="""\
feat(ckpt): load a pickle without running it

A pickle can call any function that it names.

Load it with an Unpickler whose find_class knows a list of names, as Python's
documentation recommends, after one pass of pickletools.genops that bounds
memory and time.
""",
    why="A pickle of a checkpoint is loaded without running it.",
    modules=["release_checkpoint/pickles.py"],
    stands_on=["resolver"],
    problem="Whoever writes a checkpoint can run code where it is loaded: PyTorch's DCP unpickles `.metadata` without "
    "restriction. Python's Unpickler with a list of names runs nothing, but 45 kB can still make it take 0.8 GB, and a "
    "key of nested tuples ends the process.",
    changes=["A new module, `megatron.bridge.release_checkpoint.pickles`, which nothing uses yet."],
    unchanged=["Nothing else: no reader is touched."],
    tested=[
        "Pickles that call functions, that are cut off, or that ask for memory or time are refused, in unit tests."
    ],
    later=["What `.metadata` may name, and the readers, are in the next changes."],
    tests={"tests/unit/bridge/release_checkpoint/test_load_pickle.py": "release_checkpoint/"},
)
