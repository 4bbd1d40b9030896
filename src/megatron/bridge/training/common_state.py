# SPDX-License-Identifier: Apache-2.0
"""What a release checkpoint has beside its shards, in the form of every Megatron Core and every PyTorch.

Megatron Core up to 0.18 looks for the file ``common.pt`` only (``load_common`` in
megatron/core/dist_checkpointing/strategies/common.py). Core 0.19 writes an entry of the checkpoint instead, and reads
the file first (``load_common_state_dict`` in megatron/core/dist_checkpointing/serialization.py).

PyTorch 2.15 writes the strides of tensors into ``.metadata``, which earlier versions refuse to read
(``TensorProperties`` in torch/distributed/checkpoint/metadata.py).
"""

import copyreg
import io
import os
import pickle
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron.bridge.release_checkpoint.layout import COMMON_PT, METADATA, as_path


# dtype, layout, requires_grad, memory format, pin_memory
_PROPERTIES = 5


def write_common_pt(payload: str | os.PathLike) -> None:
    """Write the common state of a payload as ``common.pt``, too, if Megatron Core has made it an entry.

    The payload's ``.metadata`` is written again if only the newest PyTorch could read it.

    Args:
        payload: Payload folder, a local path or a MultiStorageClient URL, after every rank has written.
    """
    metadata = as_path(payload) / METADATA
    if len(TensorProperties().__getstate__()) > _PROPERTIES and metadata.exists():
        with metadata.open("rb") as file:
            found = pickle.load(file)
        with metadata.open("wb") as file:
            file.write(pickled(found))
    path = as_path(payload) / COMMON_PT
    if not path.exists():
        # Read back instead of kept from the save, so that both forms hold the same.
        state = dist_checkpointing.load_common_state_dict(str(payload))
        with path.open("wb") as file:
            torch.save(state, file)


def pickled(metadata: Any) -> bytes:
    """Return a ``Metadata`` of PyTorch's DCP as every PyTorch reads it."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(metadata)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorProperties):
            return NotImplemented
        rebuild = copyreg.__newobj__  # type: ignore[attr-defined] # typeshed lacks it
        return rebuild, (TensorProperties,), value.__getstate__()[:_PROPERTIES]
