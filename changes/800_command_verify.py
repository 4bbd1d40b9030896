# SPDX-License-Identifier: Apache-2.0
"""The function and the command that prove a checkpoint."""

from fork.change import Change


change = Change(
    name="command-verify",
    message="""\
feat(ckpt): add the command megatron-bridge verify

An error of a conversion shows in the loss curve of a training, or never.

`megatron-bridge verify OUT` starts Megatron-LM's model with the flags that
the import prints, and compares its logits with those of transformers. The
verdict is same, no flags, differs, or not proved.
""",
    why="A user can compare Megatron-LM's logits for a checkpoint with those of transformers.",
    modules=["cli/verify.py", "verify/proof.py"],
    problem=(
        "After `AutoBridge.import_ckpt(hf_model, out)`, nothing tells whether Megatron-LM computes what transformers "
        "computes. A mistake in the weights or in a flag shows in the loss curve of `pretrain_gpt.py --load out`, "
        "hours later or never."
    ),
    changes=[
        "`megatron-bridge verify OUT` and `megatron.bridge.verify.proof.verify` compare a release checkpoint "
        "with the Hugging Face model that it was made from, or a trained checkpoint with its export.",
    ],
    unchanged=[
        "`AutoBridge` and the scripts in scripts/conversion.",
    ],
    tested=[
        "A release checkpoint of Llama 3 on the CPU, and every combination of answers of the two models in unit "
        "tests.",
    ],
    later=[
        "Imports compare by themselves with `verify-at-import`.",
    ],
    notes=[
        "The wheels of megatron-core before 0.19 have no builder for Megatron-LM's models. With these the "
        'verdict is "not proved".',
    ],
    tests={"tests/unit/bridge/test_command_verify.py": "cli/"},
    stands_on=["command-inspect", "verify-process"],
)
