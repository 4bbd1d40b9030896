# SPDX-License-Identifier: Apache-2.0
"""An export accounts for each tensor of the checkpoint, and for each tensor of the Hugging Face model."""

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    assign,
    call,
    decorate,
    expression,
    ifs,
    insert_after,
    insert_before,
    pass_argument,
    set_default,
    wrap,
)


# Their sources are mocks, whose names are asked for now.
MOCKS = {
    "_make_fake_source": ("source", ">=0.7"),
    "TestAutoBridge.test_save_hf_weights_filters_quantizer_tensors": ("mock_source", ""),
    "TestAutoBridge.test_save_hf_weights_no_sidecar_when_not_quantized": ("mock_source", ""),
    "TestAutoBridge.test_save_hf_weights_ignores_mtp_source_keys_when_mtp_disabled": ("mock_source", ">=0.7"),
}
# They expect what is not strict.
EXPORTS = {
    "test_export_ckpt_basic": "",
    "test_export_ckpt_with_kwargs": "",
    "test_export_ckpt_preserves_existing_distributed_context": ">=0.7",
}
HAS_SOURCE = 'hasattr(self.hf_pretrained, "state") and hasattr(self.hf_pretrained.state, "source")'
IN_FILES = "isinstance(self.hf_pretrained.state.source, SafeTensorsStateSource)"

change = Change(
    name="export-account",
    message="""\
fix(ckpt)!: account for every tensor of an export

An export of a checkpoint that didn't fit the config ended in PyTorch's
CheckpointException, or lost the tensors that the model had no place for.
GPT-OSS that was imported from MXFP4 came back without its experts.

Compare the model with the checkpoint, and what is written with what
transformers' model has. `export_ckpt` is strict by default now; with
`strict=False` it warns.
""",
    why="Every tensor that the Hugging Face model has is in the export, none is besides, or it is refused.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import export_account"),
                set_default("AutoBridge.export_ckpt", "strict", "True"),
                decorate("AutoBridge.export_ckpt", "export_account.accounts_for_tensors"),
                insert_before(
                    "AutoBridge.save_hf_weights",
                    ifs(f"{HAS_SOURCE} and {IN_FILES}"),
                    "generator = export_account.accounted(self, generator, strict)\n"
                    "strict = strict and not export_account.is_exported()",
                    done=call("export_account.accounted"),
                ),
                wrap(
                    "AutoBridge.save_hf_weights",
                    expression(f"{HAS_SOURCE} and {IN_FILES}"),
                    "{} and export_account.has_files_of_source(self)",
                    releases=">=0.5",
                ),
            ],
        ),
        File(
            "models/conversion/model_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import export_account"),
                insert_after(
                    "MegatronModelBridge.stream_weights_megatron_to_hf",
                    assign("conversion_tasks"),
                    "export_account.check_used(self, unwrap_model(megatron_model), conversion_tasks)",
                ),
            ],
        ),
        File(
            "training/checkpointing.py",
            [
                add_import("from megatron.bridge.models.conversion import export_account"),
                insert_after(
                    "_load_model_weights_from_checkpoint",
                    call("match_checkpoint"),
                    "export_account.check_stored(sharded_state_dict, checkpoint_path)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/export_account.py"],
    problem=(
        "`bridge.export_ckpt(checkpoint, hf_out)` ends in a traceback of 83 lines if the config has more layers than "
        "the checkpoint. If it has fewer, the tensors without a place are dropped and the export reports success."
    ),
    changes=[
        "Unless `strict=False`, `export_ckpt` refuses a checkpoint with tensors that the model has no place for, "
        "and an export that would lack tensors of the Hugging Face model.",
        "Tensors that the source doesn't have but the trained config does are exported: an output head of its "
        "own, biases, more experts.",
    ],
    unchanged=[
        "Exports of checkpoints that fit their config.",
    ],
    tested=[
        "For every family that converts on a CPU, the export has the tensors that transformers saves.",
    ],
    limit=600,
    limit_reason="one module, and a test of each tensor that it refuses",
    stands_on=["trained-config", "accounting", "transformer-engine-keys", "export-staging"],
    upstream_tests=[
        File(
            "tests/unit_tests/models/test_auto_bridge.py",
            [
                *(
                    insert_after(scope, assign(source), f"{source}.get_all_keys.return_value = []", releases=releases)
                    for scope, (source, releases) in MOCKS.items()
                ),
                *(
                    pass_argument(
                        f"TestAutoBridge.{test}",
                        call("unwrap(AutoBridge.export_ckpt)"),
                        "strict=False",
                        releases=releases,
                    )
                    for test, releases in EXPORTS.items()
                ),
            ],
        )
    ],
    tests={"tests/unit/bridge/test_export_account.py": "models/conversion/test_export_account.py"},
)
