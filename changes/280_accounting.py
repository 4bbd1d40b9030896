# SPDX-License-Identifier: Apache-2.0
"""An import accounts for each tensor of the checkpoint and each parameter of the model, before it reads a weight."""

from fork.change import Change
from fork.edits import (
    File,
    add_import,
    add_parameter,
    assign,
    call,
    expression,
    ifs,
    insert_before,
    replace,
)


STRICT_DOC = (
    "If True, a tensor of the checkpoint that the Megatron model has no place for is an error. If False, a warning "
    "names it and the model is imported without it. A parameter without a source is an error in any case."
)

change = Change(
    name="accounting",
    message="""\
fix(model)!: account for every tensor and parameter of an import

A parameter that no mapping knows, or whose tensors are missing, was a line
of the log, and its memory was saved uninitialized; a tensor that no mapping
reads was left out without a word. Qwen3-MoE with mlp_only_layers and Llama
with attention_bias ended so with exit code 0, as another model.

Try each conversion task on tensors without values before a weight is read.
A parameter without a source is an error, and so is a tensor without a place,
which strict=False turns into a warning. Prediction layers that are left out
are told.
""",
    why="Nothing of a checkpoint is left out in silence, and no parameter is saved that was only allocated.",
    edits=[
        File(
            "models/conversion/model_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import accounting"),
                add_import("from megatron.bridge.release_checkpoint import proof"),
                # The account names what these lines name one by one.
                replace(
                    "MegatronModelBridge.build_conversion_tasks",
                    expression("logger.warning"),
                    "(logger.warning if proof.is_strict() is None else logger.debug)",
                    count=3,
                ),
                insert_before(
                    "MegatronModelBridge.load_weights_hf_to_megatron",
                    assign("description"),
                    "accounting.account(\n"
                    "    self, hf_pretrained, unwrap_model(megatron_model), hf_to_megatron_tasks, allowed_mismatched_params\n"
                    ")",
                    done=call("accounting.account"),
                ),
            ],
        ),
        File(
            "models/conversion/auto_bridge.py",
            [
                add_import("from megatron.bridge.models.conversion import accounting"),
                add_parameter("AutoBridge.import_ckpt", "strict: bool = True", keyword_only=True, doc=STRICT_DOC),
                insert_before(
                    "AutoBridge.to_megatron_provider",
                    ifs("load_weights"),
                    "if hf_path is None and (load_weights or proof.is_strict() is not None):\n"
                    "    accounting.leave_out_prediction_layers(provider, self.hf_pretrained)",
                ),
            ],
        ),
    ],
    modules=["models/conversion/accounting.py"],
    problem="`AutoBridge.import_ckpt` of Qwen3-MoE with `mlp_only_layers` saves uninitialized memory, with exit code 0.",
    changes=[
        "`import_ckpt` refuses a checkpoint that has no source for a parameter, or a tensor that the model has no place "
        "for; `strict=False` turns the latter into a warning.",
        "`load_hf_weights` and `to_megatron_model` refuse a parameter without a source, unless the model initializes it.",
        "Layers for multi-token prediction that the config names and the weights lack are left out, with a warning.",
    ],
    unchanged=["What is written of a checkpoint that is imported whole."],
    tested=["Every family that converts on a CPU, with NaN in each parameter before the weights are loaded."],
    tests={"tests/unit/bridge/test_accounting.py": "models/test_accounting.py"},
    stands_on=["quantized-checkpoints", "stored-tensors", "proof"],
)
