# SPDX-License-Identifier: Apache-2.0
"""import_ckpt refuses a dtype that Megatron-LM doesn't train in."""

from fork.change import Change
from fork.edits import File, assign, insert_after


change = Change(
    name="model-dtype",
    message="""\
fix(ckpt)!: refuse a dtype that Megatron-LM doesn't train in

A config.json with float8_e4m3fn and weights in bfloat16 was imported in FP8,
without scales. float64 and complex64 gave checkpoints in these dtypes, and an
integer an error of PyTorch that doesn't name the key.

Take the dtypes that Megatron-LM trains in, and refuse others by name.
""",
    why="A checkpoint has a dtype that Megatron-LM trains in.",
    edits=[
        File(
            "models/conversion/auto_bridge.py",
            [
                insert_after(
                    "AutoBridge.import_ckpt",
                    assign("bridge"),
                    "from megatron.bridge.models.conversion.model_dtype import check_dtype\n\ncheck_dtype(bridge)\n",
                ),
            ],
        ),
    ],
    modules=["models/conversion/model_dtype.py"],
    problem=(
        "`AutoBridge.import_ckpt` of weights in bfloat16 with a config.json that has `dtype: float8_e4m3fn` writes a "
        "checkpoint in FP8 without scales, which computes something else."
    ),
    changes=["`import_ckpt` takes float32, bfloat16, and float16, and refuses another dtype by name."],
    unchanged=["FP8 checkpoints with scales, whose config.json has the dtype of the model that they were made of."],
    tested=["Each dtype, of config.json and of the option."],
    tests={"tests/unit/bridge/test_model_dtype.py": "models/"},
    stands_on=["config-check"],
)
