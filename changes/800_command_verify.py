# SPDX-License-Identifier: Apache-2.0
"""The function and the command that prove a checkpoint."""

from fork.change import Change


change = Change(
    name="command-verify",
    message="""\
feat(ckpt): add the command megatron-bridge verify

It compares the logits of Megatron-LM, started with the flags that the import
prints, with those of transformers. The verdict is same, no flags, differs, or
not proved.
""",
    why="A user can compare Megatron-LM's logits for a checkpoint with those of transformers.",
    modules=["cli/verify.py", "verify/proof.py"],
    problem="Whether a conversion was right shows only in the loss curve of a training, or never.",
    changes=[
        "`megatron-bridge verify OUT` and `megatron.bridge.verify.proof.verify` compare a release, or a training with its "
        "export, with the Hugging Face model.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=["A release of Llama 3 on the CPU; every combination of answers of both models."],
    notes=[
        "megatron-core before 0.19 has no builder of Megatron-LM's models in its wheel: the verdict is then not proved."
    ],
    tests={"tests/unit/bridge/test_command_verify.py": "cli/"},
    stands_on=["command-inspect", "verify-process"],
)
