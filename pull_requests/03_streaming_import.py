# SPDX-License-Identifier: Apache-2.0
"""Streaming import: what the pull request has beside the change."""

from fork.edits import File, call, pass_argument
from fork.pull_request import LOCK, PullRequest, TextEdit


# They go the way through memory, with a mock of the bridge, which has no weights to stream.
IN_MEMORY = {
    "test_import_ckpt_basic": "",
    "test_import_ckpt_with_kwargs": "",
    "test_import_ckpt_with_low_memory_save": ">=0.7",
    "test_import_ckpt_preserves_existing_distributed_context": ">=0.7",
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context": ">=0.7",
}

pull_request = PullRequest(
    change="streaming-import",
    changelog=[
        "`AutoBridge.import_ckpt(streaming=True)`, the default, makes the model on the meta device and reads, converts and "
        "writes tensor by tensor; `streaming=False` goes through memory as before.",
        "A model that can't be streamed is imported in memory, and an info line says why.",
    ],
    notes=["The tests use hypothesis, which joins the group `test`.", LOCK],
    tested=["What is written is what an import in memory writes, with Bridge 0.3.1 to 0.6.2 and core 0.16 to 0.19."],
    stands_on=["release-checkpoints", "conversion-without-cuda"],
    tests={"bridge/test_streaming*.py": "training/"},
    others=[
        TextEdit("pyproject.toml", "add hypothesis", r"^(test = \[\n)", r'\1    "hypothesis>=6.100",\n', '"hypothesis')
    ],
    expectations=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                pass_argument(
                    f"TestAutoBridge.{test}", call("AutoBridge.import_ckpt"), "streaming=False", releases=releases
                )
                for test, releases in IN_MEMORY.items()
            ],
        )
    ],
)
