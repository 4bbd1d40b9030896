# SPDX-License-Identifier: Apache-2.0
"""Payloads in Megatron-LM's other formats, by what `--ckpt-format` calls them: torch, torch_dcp, and fsdp_dtensor."""

import re
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint.metadata import Metadata, read_common_state
from megatron.bridge.release_checkpoint.pickles import Inert, UnreadablePickle
from megatron.bridge.release_checkpoint.ranks import RANK_FILE, Ranks, UnmergeableRanks
from megatron.bridge.release_checkpoint.state import CommonState


ENTRIES = "entries"
"""The form of the common state of torch_dcp and fsdp_dtensor: an entry for each of its values."""

SAVED_WITH = {
    "torch_dcp": ("--ckpt-format", "torch_dcp", "--use-torch-fsdp2"),
    "fsdp_dtensor": ("--ckpt-format", "fsdp_dtensor", "--use-megatron-fsdp"),
}
"""Flags of a training that saves, and loads, a format (validate_args in megatron/training/arguments.py, core 0.19)."""

_STATE = ("args", "checkpoint_version", "iteration")
# Megatron-FSDP puts the halves of a gated projection into entries of their own
# (handle_swiglu_in_state_dict in megatron/core/transformer/fsdp_dtensor_checkpoint.py, core 0.19).
_FSDP_DTENSOR = re.compile(r"model\d*\.(?:module\.)+|.*\.linear_fc1\.(?:weight|bias)\d*_[wv]$")


def read_ranks(folder: Path, damage: list[str]) -> dict[str, Any]:
    """Read what the files of all ranks hold beside values (torch).

    Args:
        folder: Payload folder.
        damage: Takes a line for each kind of damage.

    Returns:
        The fields of a `Payload`.
    """
    found: dict[str, Any] = {"format": "torch"}
    try:
        ranks = found["ranks"] = Ranks(folder)
        found["forms"] = {RANK_FILE: CommonState(ranks.state)}
        damage += [f"{name} is missing" for name in ranks.missing]
        if not ranks.missing:
            tensors = {name: (weight.shape, weight.dtype) for name, weight in ranks.weights.items()}
            found["metadata"] = Metadata(tensors, (), ())
    except (UnmergeableRanks, UnreadablePickle) as error:
        damage.append(str(error))
    except OSError as error:
        damage.append(f"{error.filename} can't be read ({error.strerror}). Make it readable first.")
    return found


def read_entries(folder: Path, metadata: Metadata, damage: list[str]) -> dict[str, Any]:
    """Read the state that is in entries of its own (torch_dcp, fsdp_dtensor). As `read_ranks`."""
    state: dict[str, Any] = {}
    try:
        for shard in metadata.shards:
            if shard.entry in _STATE and not damage:
                state[shard.entry] = read_common_state(folder / shard.file, shard.offset, shard.length)
    except (UnreadablePickle, OSError) as error:
        damage.append(str(error))
    args = state.get("args")
    said = args.get("ckpt_format") if isinstance(args, Inert) else None
    is_megatron_fsdp = said == "fsdp_dtensor" or any(_FSDP_DTENSOR.match(name) for name in metadata.tensors)
    return {
        "format": "fsdp_dtensor" if is_megatron_fsdp else "torch_dcp",
        "forms": {ENTRIES: CommonState(state)},
    }
