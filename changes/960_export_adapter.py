# SPDX-License-Identifier: Apache-2.0
"""Adapters that Bridge has trained are exported, merged into their base or alone."""

from fork.change import Change
from fork.edits import File, add_import, assign, decorate, insert_before


change = Change(
    name="export-adapter",
    message="""\
feat(ckpt): export what was trained with LoRA

A checkpoint of a LoRA training has no base weights, and was refused at
export.

`export_ckpt` exports the base with the adapters merged, tensor by tensor.
`export_adapter` writes the adapters in the form that PEFT loads, without
the weights of the base.
""",
    why="A training with LoRA is exported as a merged model, or as an adapter.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import trained_adapter"),
                decorate("AutoBridge.export_ckpt", "trained_adapter.exports_merged", outermost=True),
                insert_before(
                    "AutoBridge.export_ckpt",
                    assign("megatron_model"),
                    "streamed_model = trained_adapter.merged(streamed_model)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/trained_adapter.py"],
    problem=(
        "`bridge.export_ckpt(checkpoint, hf_out)` fails for a checkpoint that was trained with LoRA: it holds the "
        "adapters alone, and the export looks for the weights of the whole model."
    ),
    changes=[
        "`export_ckpt` of a checkpoint of adapters exports the model that they were trained on, with the "
        "adapters merged.",
        "`export_adapter` exports the adapters in PEFT's form.",
    ],
    unchanged=["Exports of other checkpoints.", "`AutoBridge.export_adapter_ckpt`."],
    tested=[
        "Adapters that were trained on the CPU. What PEFT merges from the exported adapter equals the merged "
        "export bit for bit, and so does Bridge's own merge in memory.",
    ],
    stands_on=["import-adapter", "accelerator"],
    tests={"tests/unit/bridge/test_trained_adapter.py": "models/"},
)
