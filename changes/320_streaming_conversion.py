# SPDX-License-Identifier: Apache-2.0
"""A bridge's mappings make a parameter of stored tensors."""

from fork.change import Change


change = Change(
    name="streaming-conversion",
    message="""\
perf(ckpt): run parameter mappings on stored tensors

A bridge's own mappings run on the tensors in safetensors files. What they
only rearrange stays a list of pieces. What they compute is computed when it
is read. No list of families is needed.
""",
    why="Every family's own mappings run on tensors that are not in memory.",
    modules=["models/conversion/streaming/convert.py"],
    problem=(
        "`AutoBridge.import_ckpt` needs the weights in memory because a bridge's mappings do. A list of mappings "
        "that work without them would be out of date with the next family. This third of six changes runs any "
        "mapping on stored tensors: what it rearranges isn't read, and what it computes is computed when it is "
        "written."
    ),
    unchanged=["No mapping changes."],
    changes=["Nothing yet: later changes use it."],
    tested=[
        "Mappings that rearrange, that change a clone, and that dequantize blocks of FP8.",
    ],
    tests={"tests/unit/bridge/test_streaming_convert.py": "models/"},
    stands_on=["piecewise-tensor", "hf-checkpoint"],
)
