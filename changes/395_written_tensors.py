# SPDX-License-Identifier: Apache-2.0
"""An import writes no tensor that was only allocated."""

from fork.change import Change
from fork.edits import File, add_import, call, insert_before


change = Change(
    name="written-tensors",
    message="""\
fix(ckpt): write no tensor that an import has only allocated

The account of an import goes by the parameters of the model. A model may
save more, such as a buffer. Check each tensor of the sharded state dict
before it is written: it is a parameter with a source, or made of tensors of
the checkpoint, or one of the few values that a module makes.
""",
    why="Nothing that was only allocated reaches a file, whatever a model saves beside its parameters.",
    edits=[
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.models.conversion.written import check_written"),
                insert_before("save_checkpoint", call("dist_checkpointing.save"), "check_written(state_dict)"),
            ],
        ),
    ],
    modules=["models/conversion/written.py"],
    problem="A buffer that a model saves and no mapping knows is written as it was allocated.",
    changes=["`import_ckpt` refuses a tensor of the model's state dict that has no source."],
    unchanged=["Every other save."],
    tested=[
        "Imports on the CPU, in memory and streaming, of models with such a buffer, and of the families that stream."
    ],
    tests={"tests/unit/bridge/test_written.py": "models/test_written.py"},
    stands_on=["streaming-import", "transformer-engine-keys"],
)
