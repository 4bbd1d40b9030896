# SPDX-License-Identifier: Apache-2.0
"""Plan a streaming import of models that are too large for this host, without reading or writing weights."""

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from benchmarks.shapes import Shape
from benchmarks.weights import write_plan
from megatron.bridge import AutoBridge
from megatron.bridge.host.accelerator import with_process_group
from megatron.bridge.models.conversion.streaming import execute
from megatron.bridge.models.conversion.streaming.plan import plan_import
from megatron.bridge.models.conversion.utils import unwrap_model


@dataclass(frozen=True)
class Plan:
    """The plan of an import.

    Attributes:
        items: The number of tensors to write, each a part of an entry of the checkpoint.
        bytes: Their bytes in total.
        largest: The bytes of the largest.
        block: The most bytes of weights that all threads hold at once.
    """

    items: int
    bytes: int
    largest: int
    block: int


@with_process_group
def plan(shape: Shape) -> Plan:
    """Return the plan of a shape, from a model on the meta device and a checkpoint of sparse files.

    Raises:
        RuntimeError: The model can't be streamed.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_plan(Path(folder), shape)
        model = plan_import(AutoBridge.from_hf_pretrained(folder), Path(folder, "out"))
    if model is None:
        raise RuntimeError("the model can't be streamed; the log says why")
    sizes = []
    for chunk in unwrap_model(model):
        state_dict = chunk.sharded_state_dict()
        apply_factories(state_dict)
        for entry in nested_values(state_dict):
            if isinstance(entry, ShardedTensor) and entry.data is not None:
                sizes.append(prod(entry.local_shape) * entry.dtype.itemsize)
    block = min(execute.BLOCK_BYTES, max(sizes)) * execute.processors()
    return Plan(len(sizes), sum(sizes), max(sizes), block)
