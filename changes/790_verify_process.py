# SPDX-License-Identifier: Apache-2.0
"""The process in which a proof computes."""

from fork.change import Change


change = Change(
    name="verify-process",
    message="""\
feat(ckpt): compare logits in a process of its own

The process that redirects CUDA to the CPU must do nothing else. It reads one
request, computes the logits of transformers and of Megatron-LM on the same
tokens, and answers with their difference.
""",
    why="A proof never touches the process that asks for it.",
    modules=["verify/__main__.py", "verify/process.py"],
    problem="What a proof changes in torch and Megatron Core must not reach a conversion or a training.",
    changes=["`python -m megatron.bridge.verify` answers a request for a comparison."],
    unchanged=["Every other process."],
    tested=["Figures of equal and other logits; processes that are killed."],
    tests={"tests/unit/bridge/test_verify_process.py": "verify/"},
    stands_on=["verify-twin", "doubts", "command-import"],
)
