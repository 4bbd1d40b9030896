# SPDX-License-Identifier: Apache-2.0
"""import_ckpt refuses quantized checkpoints that no bridge dequantizes, by name."""

from fork.change import Change
from fork.edits import File, insert_first


change = Change(
    name="quantized-checkpoints",
    message="""\
fix(ckpt): refuse quantized checkpoints by name

import_ckpt converted GPTQ, AWQ and INT4 checkpoints to uninitialized memory,
and FP8 ones without their scales, and ended with exit code 0.

Tell these forms by what is in the files, and refuse each in one line that
says what to do. What a bridge dequantizes (DeepSeek-V3's FP8, GPT-OSS's
MXFP4 and others) is imported as before, if no scale is missing.
""",
    why="A quantized checkpoint is dequantized by its bridge or refused, and never read as if it were plain.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_first(
                    "AutoBridge.import_ckpt",
                    "from megatron.bridge.models.conversion.quantized import check_stored_form\n"
                    "\n"
                    "check_stored_form(hf_model_id)\n",
                )
            ],
        )
    ],
    modules=["models/conversion/quantized.py"],
    problem="`AutoBridge.import_ckpt` of a GPTQ checkpoint ends without an error and saves uninitialized memory.",
    changes=["`import_ckpt` refuses quantized checkpoints that their bridge doesn't dequantize, and PEFT adapters."],
    unchanged=["Checkpoints that a bridge dequantizes, and plain weights whose config still names a quantization."],
    tested=["Each form, with its config and without, on tiny checkpoints on the CPU."],
    tests={"tests/unit/bridge/test_quantized.py": "models/test_quantized.py"},
    stands_on=["wrapped-checkpoints", "hf-files"],
)
