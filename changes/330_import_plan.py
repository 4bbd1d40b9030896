# SPDX-License-Identifier: Apache-2.0
"""A model whose parameters say which bytes make them."""

from fork.change import Change


change = Change(
    name="import-plan",
    message="""\
perf(ckpt): plan an import on the meta device

The model is made on the meta device, and each parameter is replaced by a
piecewise tensor. The model's own `sharded_state_dict()` then says which bytes
of the Hugging Face checkpoint make which tensor of the Megatron checkpoint.
""",
    why="An import can be planned without reading a weight.",
    modules=[
        "models/conversion/streaming/model.py",
        "models/conversion/streaming/plan.py",
        "release_checkpoint/target.py",
    ],
    problem=(
        "`AutoBridge.import_ckpt` derives layout, keys, and chunks of a checkpoint from a model in memory, although "
        "they follow from names and shapes. This fourth of six changes makes the model on the meta device, and its "
        "parameters say where their values come from."
    ),
    unchanged=["No existing file changes, and nothing is written."],
    changes=["Nothing yet: `streaming-import` uses it."],
    tested=[
        "The parameters of a plan have the values of the checkpoint. A model that can't be planned gets a warning.",
    ],
    tests={"tests/unit/bridge/test_streaming_plan.py": "models/"},
    stands_on=["streaming-conversion", "accelerator", "casts"],
)
