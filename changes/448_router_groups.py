# SPDX-License-Identifier: Apache-2.0
"""Groups of experts of a router: what Megatron Core computes of them."""

from fork.change import Change
from fork.edits import File, assign, insert_after


change = Change(
    name="router-groups",
    message="""\
fix(model): choose no groups of experts where there are none

A config.json with topk_group and without n_group stopped in Megatron Core,
also for families whose routers have no groups. And nothing says that Megatron
Core rates groups otherwise than transformers if num_experts_per_tok isn't
twice topk_group.

Ignore `topk_group` where there is no `n_group`, as transformers does, and
tell which groups are rated otherwise.
""",
    why="A config with a key that its family doesn't read converts, and it is known which groups Megatron Core can't rate.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.to_megatron_provider",
                    assign("provider"),
                    "from megatron.bridge.models.conversion.router_groups import drop_unused\n"
                    "\n"
                    "drop_unused(provider)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/router_groups.py"],
    problem=(
        "`AutoBridge.import_ckpt` of a Qwen3-MoE with `topk_group` in its config.json stops with `moe_router_num_groups "
        "must be specified`. transformers doesn't read the key."
    ),
    changes=[
        "Without `n_group`, `topk_group` doesn't reach the provider.",
        "`group_problems` tells which groups Megatron Core rates otherwise. `config-check` refuses them.",
    ],
    unchanged=["Configs with groups, as published."],
    tested=["Logits of Megatron-LM and transformers on tiny models, on the CPU."],
    tests={"tests/unit/bridge/test_router_groups.py": "models/"},
    stands_on=["rope-and-windows"],
)
