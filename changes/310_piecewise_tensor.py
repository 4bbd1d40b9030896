# SPDX-License-Identifier: Apache-2.0
"""A tensor that is a list of pieces of files."""

from fork.change import Change


change = Change(
    name="piecewise-tensor",
    message="""\
perf(ckpt): add a tensor that is a list of pieces of files

Parameter mappings take Hugging Face's tensors apart and put the pieces
together.

On a `PiecewiseTensor` they do so without reading a value: views,
concatenation along the first dimension, and changes of dtype return a new
list of pieces.
""",
    why="Parameter mappings can run without reading a value.",
    modules=["models/conversion/streaming/tensor.py"],
    problem=(
        "`AutoBridge.import_ckpt` runs parameter mappings on tensors in memory, although most mappings only take "
        "tensors apart and put the pieces together. This second of six changes adds a tensor on which such a mapping "
        "reads nothing."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: later changes use it."],
    tested=[
        "Operations of mappings give the same values as on ordinary tensors, and read nothing unless they compute.",
    ],
    tests={"tests/unit/bridge/test_streaming_tensor.py": "models/"},
    stands_on=["streaming-sources"],
)
