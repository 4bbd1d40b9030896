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

If no mapping knew a parameter, or its tensors were missing, the log had a
line about it, and uninitialized memory was saved. If no mapping read a
tensor, it was left out without a warning. Qwen3-MoE with mlp_only_layers and
Llama with attention_bias became different models that way, with exit code 0.

Try each conversion task on tensors without values before a weight is read.
A parameter without a source is an error. A tensor without a place is an
error, too, or a warning with strict=False. Prediction layers that are left
out are reported.
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
    problem=(
        "`AutoBridge.import_ckpt` of a Qwen3-MoE with `mlp_only_layers` saves uninitialized memory and ends with "
        "exit code 0. A parameter that no mapping knows is only a line in the log, and a tensor that no mapping "
        "reads is not even that."
    ),
    changes=[
        "`import_ckpt` refuses a checkpoint if a parameter has no source, or if the model has no place for a "
        "tensor. With `strict=False`, the latter is a warning.",
        "`load_hf_weights` and `to_megatron_model` refuse a parameter without a source, unless the model "
        "initializes it.",
        "If the config has layers for multi-token prediction and the weights don't, they are left out with a warning.",
    ],
    unchanged=[
        "What is written if every tensor has its place.",
    ],
    tested=[
        "Every family that converts on a CPU, with NaN in each parameter before the weights are loaded.",
    ],
    tests={"tests/unit/bridge/test_accounting.py": "models/test_accounting.py"},
    stands_on=["quantized-checkpoints", "stored-tensors", "proof"],
)
