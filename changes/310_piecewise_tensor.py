# SPDX-License-Identifier: Apache-2.0
"""A tensor that is a list of pieces of files."""

from fork.change import Change


change = Change(
    name="piecewise-tensor",
    message="""\
perf(ckpt): add a tensor that is a list of pieces of files

Parameter mappings take Hugging Face's tensors apart and put the pieces together.
On a `PiecewiseTensor` they do so without reading a value: views, concatenation
along the first dimension and changes of dtype return a new list of pieces.
""",
    why="Parameter mappings can run without reading a value.",
    modules=["models/conversion/streaming/tensor.py"],
    problem=(
        "To import in blocks, a parameter mapping has to run without the values of Hugging Face's tensors. Most "
        "mappings only take tensors apart and put the pieces together. This change adds a tensor on which that "
        "costs nothing."
    ),
    unchanged=["No existing file changes."],
    changes=["Nothing yet: later changes use it."],
    tested=["What mappings do has the values that it has on ordinary tensors, and reads nothing where it need not."],
    tests={"tests/unit/bridge/test_streaming_tensor.py": "models/"},
    stands_on=["streaming-sources"],
)
