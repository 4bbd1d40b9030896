# SPDX-License-Identifier: Apache-2.0
"""The command `megatron-bridge import`."""

from fork.change import Change


change = Change(
    name="command-import",
    message="""\
feat(ckpt): add the command megatron-bridge import

It runs AutoBridge.import_ckpt and prints the flags with which Megatron-LM
starts from the checkpoint. In its process, imports of Megatron Core and
transformers that a conversion never uses are deferred.
""",
    why="The command megatron-bridge imports Hugging Face models.",
    modules=["utils/deferred.py", "cli/import_.py", "cli/preloaded.py", "cli/ranks.py"],
    problem=(
        "An import needs a script around `AutoBridge.import_ckpt`. `from megatron.bridge import AutoBridge` alone "
        "takes ten seconds or more, mostly because Megatron Core and transformers import what only training needs."
    ),
    changes=[
        "`megatron-bridge import` runs `AutoBridge.import_ckpt`.",
    ],
    unchanged=["AutoBridge and Bridge's scripts."],
    tested=[
        "A deferred package is imported when it is used. An import of Llama loads none of them.",
    ],
    tests={"tests/unit/bridge/test_deferred.py": "cli/"},
    limit=600,
    limit_reason="What is deferred, and how, is only right for what an import does; one test shows both.",
    stands_on=["command-repair", "lazy-models", "short-scans", "export-staging", "layout-families", "processes"],
)
