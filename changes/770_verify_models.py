# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's own model of a release, and Bridge's, on a host without CUDA."""

from fork.change import Change


change = Change(
    name="verify-models",
    message="""\
feat(ckpt): build Megatron-LM's model of a release on any host

Whether the flags of a release checkpoint describe the right model shows
only in Megatron-LM, which needs a GPU to build one.

Build the model from the flags that an import prints, with Megatron-LM's own
argument parser and model builder, and without a GPU. In a process that does
nothing else, its calls of CUDA are redirected to the CPU.
""",
    why="A proof builds Megatron-LM's own model from the printed flags, on any host.",
    modules=[
        "verify/__init__.py",
        "verify/megatron_models.py",
        "verify/verdict.py",
        "verify/without_cuda.py",
    ],
    problem=(
        "Without a GPU, nobody can tell whether the flags that `AutoBridge.import_ckpt(hf_model, out)` prints build "
        "the model that transformers has: `pretrain_gpt.py --load out --use-checkpoint-args` stops at the first call "
        "of CUDA. A wrong flag raises no error. It only makes the loss worse."
    ),
    changes=[
        "Nothing yet. `command-verify` compares logits with the model that this change builds.",
    ],
    unchanged=[
        "Conversions and trainings: their processes don't import the new modules.",
    ],
    tested=[
        "On the CPU, Megatron-LM's logits of Llama 3, GPT-OSS, DeepSeek-V3, and Gemma equal those of "
        "transformers within 5e-5.",
    ],
    later=[
        "The comparison follows in `verify-process`, and the command in `command-verify`.",
    ],
    tests={"tests/unit/bridge/test_verify_without_cuda.py": "verify/"},
    stands_on=["release-checkpoints", "local-layers"],
)
