# SPDX-License-Identifier: Apache-2.0
"""Import without memory for the model: plan which bytes make which tensor, then read, convert and write in blocks.

`plan.py` makes the plan: a model whose parameters are piecewise tensors (`tensor.py`), lists of pieces of files
(`sources.py`), which the bridge's own mappings put together (`convert.py`). `dcp.py` writes them as a distributed
checkpoint. It knows nothing of models, nor do `execute.py`, which runs its threads, and `archive.py`, which has the
form of a tensor in the checkpoint.
"""

__all__: list[str] = []
