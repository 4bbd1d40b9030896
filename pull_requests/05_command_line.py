# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge`: what the pull request has beside the change."""

from fork.pull_request import LOCK, PullRequest


pull_request = PullRequest(
    change="command-line",
    changelog=[
        "`megatron-bridge import` and `export` are `import_ckpt` and `export_ckpt`.",
        "`megatron-bridge inspect` says what is at a path and what Megatron-LM does with it, without running a pickle.",
        "`megatron-bridge repair` makes a release checkpoint of what `import_ckpt` wrote before.",
    ],
    tested=["Checkpoints in every state that people have on disk, in the unit tests."],
    notes=[LOCK],
    tests={
        "bridge_cli/conftest.py": "bridge_cli/",
        "bridge_cli/test_layouts.py": "bridge_cli/",
        "bridge_cli/test_lean_import.py": "bridge_cli/",
        "bridge_cli/test_states.py": "bridge_cli/",
    },
    stands_on=["untrusted-checkpoints", "release-checkpoints"],
)
