# SPDX-License-Identifier: Apache-2.0
"""Requirements: what the pull request has beside the change."""

from fork.pull_request import LOCK, PullRequest


pull_request = PullRequest(
    change="requirements",
    changelog=[
        "What only NVIDIA GPUs need, and `megatron-core[dev]`, moves from the base to the extra `cuda`.",
        "The base names the packages of `megatron-core[dev]` that Bridge imports on any host.",
        "`training/pretrain.py` goes without nvidia-resiliency-ext, which it needs for an annotation only.",
    ],
    tested=["Wheels of 0.3.1, 0.4.2, 0.5.1 and 0.6.2 with this change install with plain pip on a host without CUDA."],
    notes=[
        LOCK,
        "The containers and `uv sync` of the CI have to name the extra `cuda`.",
    ],
    issues=[3295],
    tests={"bridge/test_pretrain_import.py": "training/test_pretrain_import.py"},
)
