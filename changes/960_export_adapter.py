# SPDX-License-Identifier: Apache-2.0
"""Adapters that Bridge has trained are exported, merged into their base or alone."""

from fork.change import Change
from fork.edits import File, add_import, assign, decorate, insert_before


change = Change(
    name="export-adapter",
    message="""\
feat(ckpt): export what was trained with LoRA

A checkpoint of adapters was refused at export, since it has no base weights.
export_ckpt now exports their base with the adapters merged, tensor by
tensor, and export_adapter writes them as an adapter that PEFT loads, without
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
    problem="`AutoBridge.export_ckpt` of a training with LoRA fails, for the checkpoint lacks every weight of the model.",
    changes=[
        "`export_ckpt` of a checkpoint with adapters alone exports the model that they were trained on, merged.",
        "`export_adapter` exports them as an adapter of PEFT.",
    ],
    unchanged=["Exports of other checkpoints.", "`AutoBridge.export_adapter_ckpt`."],
    tested=[
        "Adapters of a training on the CPU: PEFT loads and merges them to the bits of the merged export, which is what "
        "Bridge's own merge in memory gives."
    ],
    stands_on=["import-adapter", "accelerator"],
    tests={"tests/unit/bridge/test_trained_adapter.py": "models/"},
)
