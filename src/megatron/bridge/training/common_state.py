# SPDX-License-Identifier: Apache-2.0
"""The common state of a release checkpoint, in the form of every Megatron Core.

Megatron Core up to 0.18 looks for the file ``common.pt`` only (``load_common`` in
megatron/core/dist_checkpointing/strategies/common.py). Core 0.19 writes an entry of the checkpoint instead, and reads
the file first (``load_common_state_dict`` in megatron/core/dist_checkpointing/serialization.py).
"""

import os

import torch
from megatron.core import dist_checkpointing

from megatron.bridge.release_checkpoint.layout import COMMON_PT, as_path


def write_common_pt(payload: str | os.PathLike) -> None:
    """Write the common state of a payload as ``common.pt``, too, if Megatron Core has made it an entry.

    Args:
        payload: Payload folder, a local path or a MultiStorageClient URL, after every rank has written.
    """
    path = as_path(payload) / COMMON_PT
    if not path.exists():
        # Read back instead of kept from the save, so that both forms hold the same.
        state = dist_checkpointing.load_common_state_dict(str(payload))
        with path.open("wb") as file:
            torch.save(state, file)
