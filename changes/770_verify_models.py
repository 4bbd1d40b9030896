# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's own model of a release, and Bridge's, on a host without CUDA."""

from fork.change import Change


change = Change(
    name="verify-models",
    message="""\
feat(ckpt): build Megatron-LM's model of a release on any host

To compare what Megatron-LM computes with a release with what transformers
computes, its model has to be built from the flags that an import prints, by
its own argument code and builder, and without a GPU. What its forward pass
asks of CUDA is answered by the CPU, in a process that does nothing else.
""",
    why="A proof builds Megatron-LM's own model from the printed flags, on any host.",
    modules=[
        "verify/__init__.py",
        "verify/megatron_models.py",
        "verify/verdict.py",
        "verify/without_cuda.py",
    ],
    problem="Whether the flags that an import prints give the model of transformers, nobody can tell without a GPU.",
    changes=["Nothing that a user sees."],
    unchanged=["Every other process: nothing of it is imported."],
    tested=[
        "Megatron-LM's logits of Llama 3, GPT-OSS, DeepSeek-V3, and Gemma are those of transformers within 5e-5, on the CPU."
    ],
    tests={"tests/unit/bridge/test_verify_without_cuda.py": "verify/"},
    stands_on=["release-checkpoints", "local-layers"],
)
