# SPDX-License-Identifier: Apache-2.0
"""An import tells the casts that nobody asked for, and refuses those that overflow."""

import libcst.matchers as m

from fork.change import Change
from fork.edits import File, add_import, assign, call, insert_after, insert_before, replace


change = Change(
    name="casts",
    message="""\
fix(model): report the casts of an import, refuse those that overflow

The weights of a checkpoint are cast to the dtype of its config without a
warning. A bf16 weight of 1e5 became infinity if the config says float16.

Warn about casts by kind of tensor, unless the caller asked for the dtype, and
refuse a cast that turns a finite value into infinity.
""",
    why="A cast that changes a weight is told, and one that overflows is an error.",
    edits=[
        File(
            "models/conversion/model_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import casts"),
                replace(
                    "MegatronModelBridge.load_weights_hf_to_megatron",
                    m.Expr(value=call("accounting.account")),
                    "account = accounting.account(\n"
                    "    self, hf_pretrained, unwrap_model(megatron_model), hf_to_megatron_tasks, allowed_mismatched_params\n"
                    ")",
                ),
                insert_after(
                    "MegatronModelBridge.load_weights_hf_to_megatron",
                    assign("description"),
                    "casts.warn_of_casts(account)",
                ),
                insert_before(
                    "MegatronModelBridge.load_weights_hf_to_megatron",
                    call("self._broadcast_shared_embeddings"),
                    "casts.check_overflow(account)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/casts.py"],
    problem=(
        "If config.json says float16, `AutoBridge.import_ckpt` turns a bf16 weight of 1e5 into infinity, saves it, "
        "and reports no error."
    ),
    changes=[
        "`import_ckpt` warns about casts to the config's dtype, and refuses a cast that overflows.",
    ],
    unchanged=[
        "A cast to a dtype that the caller passes as `torch_dtype` has no warning.",
    ],
    tested=[
        "Imports of tiny checkpoints on the CPU, in memory and streaming.",
    ],
    tests={"tests/unit/bridge/test_casts.py": "models/test_casts.py"},
    stands_on=["accounting"],
)
