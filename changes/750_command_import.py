# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge import`."""

from fork.change import Change


change = Change(
    name="command-import",
    message="""\
feat(ckpt): add the command megatron-bridge import

It is AutoBridge.import_ckpt, and prints the flags with which Megatron-LM
starts from the checkpoint. What Megatron Core and transformers import and a
conversion never uses is deferred in its process.
""",
    why="The command megatron-bridge imports Hugging Face models.",
    modules=["utils/deferred.py", "utils/deferred_package.py", "cli/import_.py", "cli/preloaded.py", "cli/ranks.py"],
    problem="""\
An import takes a script around `AutoBridge.import_ckpt`, and `from megatron.bridge import AutoBridge` alone takes ten
seconds and more, most of it for what Megatron Core and transformers import for training.
""",
    changes=["`megatron-bridge import` is `AutoBridge.import_ckpt`."],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=["What is deferred is there when it is used; an import of Llama loads none of it."],
    tests={"tests/unit/bridge/test_deferred.py": "cli/"},
    limit=600,
    limit_reason="What is deferred, and how, is only right for what an import does; one test shows both.",
    stands_on=["command-repair", "lazy-models", "export-staging", "layout-families", "processes"],
)
