# SPDX-License-Identifier: Apache-2.0
"""import_ckpt refuses a config.json that changes what the model computes and that Bridge's model doesn't follow."""

from fork.change import Change
from fork.edits import File, assign, insert_after, replace_in_test


CHECK = "megatron.bridge.models.conversion.config_check.check_config"
# Their bridge is a mock, without a config.
MOCKS = (
    "test_import_ckpt_basic",
    "test_import_ckpt_with_kwargs",
    "test_import_ckpt_with_low_memory_save",
    "test_import_ckpt_preserves_existing_distributed_context",
    "test_import_ckpt_scopes_standalone_cpu_state_to_gloo_context",
)

change = Change(
    name="config-check",
    message="""\
feat(ckpt)!: refuse a config.json that the imported model doesn't follow

import_ckpt ended with exit code 0 and another model where config.json had
biases, activations, routers or tied heads that a provider leaves out.

Compare the effective config, as transformers has loaded it, with the
provider key by key. A table for each family says which keys are carried,
which have to have a value, and which mean nothing; RoPE is compared number
by number. What differs is an error of one line, or a warning with
strict=False. A family without a table is imported with a warning.
""",
    why="An import follows every key of config.json that changes what the model computes, or says which it doesn't.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.import_ckpt",
                    assign("bridge"),
                    "from megatron.bridge.models.conversion.config_check import check_config\n"
                    "\n"
                    "check_config(bridge, strict)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/config_check.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Qwen3 with `attention_bias` leaves the biases out and ends without an error. "
        "The logits are off by more than their own size."
    ),
    changes=[
        "`import_ckpt` refuses a config.json with a key that changes what the model computes and that Bridge's "
        "model doesn't follow. With `strict=False`, it warns.",
        "A family whose keys were never compared is imported with a warning, unless a value is known to be left out.",
    ],
    unchanged=["The configs of published models are imported."],
    tested=["A hundred variants of 14 families, with Megatron-LM's logits beside transformers'."],
    tests={"tests/unit/bridge/test_config_check.py": "models/test_config_check.py"},
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [edit for test in MOCKS for edit in replace_in_test(f"TestAutoBridge.{test}", CHECK, releases=">=0.7")],
        )
    ],
    stands_on=["accounting", "rope-and-windows", "config-keys", "layout-config", "unproved-config", "router-groups"],
)
