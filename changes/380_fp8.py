# SPDX-License-Identifier: Apache-2.0
"""Every bridge reads FP8 weights with their scales."""

from fork.change import Change
from fork.edits import File, insert_first


change = Change(
    name="fp8",
    message="""\
feat(model): dequantize FP8 weights in every bridge

Bridges of DeepSeek-V3 and a few others dequantize FP8 in blocks of 128. The
others read FP8 weights without their scales: Qwen3 and Mistral as published
in FP8, and whatever llm-compressor, ModelOpt or FBGEMM have made.

Multiply weight and scale in float32 while the weight is read, by value,
channel, group or block as the shape of the scale says, and cast once. A
streaming import does so block by block.
""",
    why="An FP8 checkpoint is imported with its scales, whichever family and whichever tool made it.",
    edits=[
        File(
            "models/conversion/model_bridge.py",
            [
                insert_first(
                    "MegatronModelBridge.maybe_modify_loaded_hf_weight",
                    "from megatron.bridge.models.conversion.fp8 import Dequantized\n"
                    "\n"
                    'hf_state_dict = Dequantized(hf_state_dict, getattr(self, "hf_config", None))\n',
                )
            ],
        )
    ],
    modules=["models/conversion/fp8.py"],
    problem="`AutoBridge.import_ckpt` of an FP8 checkpoint, such as `Qwen/Qwen3-8B-FP8`, is refused or reads weights "
    "without their scales.",
    changes=["Bridges read FP8 weights times their scales, under each of the names in use."],
    unchanged=["Bridges that dequantize themselves, and what is read of a checkpoint without FP8."],
    tested=[
        "Scales of a tensor, a channel, a group and a block on the CPU, in memory and streaming, bit for bit like "
        "transformers' `Fp8Dequantize`; imports equal that of the dequantized checkpoint."
    ],
    tests={"tests/unit/bridge/test_fp8.py": "models/test_fp8.py"},
    stands_on=["quantized-checkpoints", "piecewise-tensor"],
)
