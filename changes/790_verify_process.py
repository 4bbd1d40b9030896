# SPDX-License-Identifier: Apache-2.0
"""The process in which a proof computes."""

from fork.change import Change


change = Change(
    name="verify-process",
    message="""\
feat(ckpt): compare logits in a process of its own

A comparison redirects CUDA to the CPU, which must not reach a conversion or
a training.

Compare in a process that does nothing else. It reads one request, computes
the logits of transformers and of Megatron-LM on the same tokens, and
answers with their difference.
""",
    why="A proof never touches the process that asks for it.",
    modules=["verify/__main__.py", "verify/process.py"],
    problem=(
        "To build Megatron-LM's model on a host without a GPU, a comparison changes functions of torch and Megatron "
        "Core. If it ran inside the process that called `AutoBridge.import_ckpt`, everything that this process does "
        "later would run with the changed functions."
    ),
    changes=[
        "`python -m megatron.bridge.verify` reads a request from its standard input and answers it. It is meant "
        "for the modules that follow, not for users.",
    ],
    unchanged=[
        "The process that asks for a comparison.",
    ],
    tested=[
        "Unit tests with equal and with different logits, and with processes that are killed.",
    ],
    later=[
        "The command for users follows in `command-verify`.",
    ],
    tests={"tests/unit/bridge/test_verify_process.py": "verify/"},
    stands_on=["verify-twin", "doubts", "command-import"],
)
