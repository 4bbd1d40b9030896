# SPDX-License-Identifier: Apache-2.0
"""A bridge's mappings make a parameter of stored tensors."""

from fork.change import Change


change = Change(
    name="streaming-conversion",
    message="""\
perf(ckpt): run parameter mappings on stored tensors

A bridge's own mappings run on the tensors of safetensors files. What they
only rearrange stays a list of pieces. What they compute is computed when it is
read. There is no list of families.
""",
    why="Every family's own mappings run on tensors that are not in memory.",
    modules=["models/conversion/streaming/convert.py"],
    problem=(
        "Each family has mappings of its own, and a list of those that can be streamed would be out of date with "
        "the next family. This change runs any mapping on stored tensors: what it rearranges is not read, and "
        "what it computes is computed when it is written."
    ),
    unchanged=["No mapping changes."],
    changes=["Nothing yet: later changes use it."],
    tested=["Mappings that rearrange, that change a clone, and that dequantize blocks of FP8."],
    tests={"tests/unit/bridge/test_streaming_convert.py": "models/"},
    stands_on=["piecewise-tensor", "hf-checkpoint"],
)
