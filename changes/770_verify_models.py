# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's own model of a release, and Bridge's, on a host without CUDA."""

from fork.change import Change


change = Change(
    name="verify-models",
    message="""\
feat(ckpt): build Megatron-LM's model of a release on any host

To compare Megatron-LM's logits for a release checkpoint with those of
transformers, build its model from the flags that an import prints, with its
own argument code and builder, and without a GPU. In a process that does
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
        "Without a GPU, nobody can tell whether the flags that `AutoBridge.import_ckpt` prints build the model that "
        "transformers has."
    ),
    changes=["Nothing that a user sees."],
    unchanged=["Every other process: nothing of it is imported."],
    tested=[
        "Megatron-LM's logits of Llama 3, GPT-OSS, DeepSeek-V3, and Gemma are those of transformers within 5e-5, on the CPU."
    ],
    tests={"tests/unit/bridge/test_verify_without_cuda.py": "verify/"},
    stands_on=["release-checkpoints", "local-layers"],
)
