# SPDX-License-Identifier: Apache-2.0
"""What a payload folder holds, by its metadata: no weights, no torch, and no pickle that runs."""

import json
import re
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint import weights
from megatron.bridge.release_checkpoint.layout import METADATA, METADATA_JSON, RANKS
from megatron.bridge.release_checkpoint.metadata import Metadata, read_metadata
from megatron.bridge.release_checkpoint.other_formats import SAVED_WITH, read_entries, read_ranks
from megatron.bridge.release_checkpoint.pickles import UnreadablePickle
from megatron.bridge.release_checkpoint.ranks import Ranks
from megatron.bridge.release_checkpoint.state import (
    COMMON_STATE,
    MAX_INT,
    CommonState,
    differences,
    plain_args,
    read_forms,
)


ESSENTIAL_ARGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
"""Args without which Megatron-LM builds another model, or none: the first that load_args_from_checkpoint and
check_checkpoint_args read (megatron/training/checkpointing.py, core 0.15 to 0.19)."""

_PARALLEL_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "CP": "context_parallel_size",
}
_OPTIMIZER_ENTRY = re.compile(r"(chained_\d+\.)?optimizer\b")


@dataclass
class Payload:
    """One folder of a checkpoint.

    Attributes:
        path: The folder.
        format: As `--ckpt-format` of Megatron-LM: "torch_dist", "torch_dcp", "fsdp_dtensor", "torch". None if it is
            none of them.
        core: Series of Megatron Core that wrote it, by what only that series writes. None if nothing tells.
        forms: The common state in each of `state.FORMS` that exists, in that order.
        source: Which of them `state` is. Default: the first that can be read.
        metadata: What `.metadata` says, None if there is none or it can't be read. Of the format torch, the tensors
            of the whole model.
        ranks: The files of the format torch.
        size: Bytes of all files.
        damage: What is missing or broken and stored nowhere else in the payload, a line each.
    """

    path: Path
    format: str | None = None
    core: str | None = None
    forms: dict[str, CommonState] = field(default_factory=dict)
    source: str | None = None
    metadata: Metadata | None = None
    ranks: Ranks | None = None
    size: int = 0
    damage: list[str] = field(default_factory=list)

    @property
    def common(self) -> str | None:
        """The forms of the common state: "common.pt", "entry", "both", another format's, or None."""
        return "both" if len(self.forms) > 1 else next(iter(self.forms), None)

    @property
    def state(self) -> dict[str, Any] | None:
        """The common state, None if there is none or it can't be read."""
        readable = (name for name, form in self.forms.items() if form.state is not None)
        name = self.source or next(readable, None)
        return self.forms[name].state if name is not None else None

    @cached_property
    def discord(self) -> list[str]:
        """The keys in which the two forms of the common state differ. None if one is missing or damaged."""
        states = [form.state for form in self.forms.values() if form.state is not None]
        return differences(*states) if len(states) > 1 else []

    @cached_property
    def args(self) -> Namespace | None:
        """Megatron-LM's args, without values that are not plain."""
        return plain_args(self.state)

    @cached_property
    def missing_args(self) -> list[str]:
        """Which of `ESSENTIAL_ARGS` are missing. Without args, all of them."""
        args = self.args
        return [name for name in ESSENTIAL_ARGS if getattr(args, name, None) is None]

    @cached_property
    def contradictions(self) -> list[str]:
        """In what the args differ from the shapes of the weights."""
        return weights.contradictions(self.args, self.metadata)

    @property
    def iteration(self) -> int:
        """The iteration in the common state, 0 if there is none."""
        iteration = (self.state or {}).get("iteration")
        return max(0, min(iteration, MAX_INT)) if type(iteration) is int else 0

    @property
    def version(self) -> float | None:
        """`checkpoint_version`: below 2.0 Megatron-LM permutes the QKV weights on load."""
        version: Any = (self.state or {}).get("checkpoint_version")
        return float(version) if type(version) in (int, float) and abs(version) <= MAX_INT else None

    @cached_property
    def has_optimizer(self) -> bool:
        """Whether there is optimizer state, which makes it a training."""
        entries = (*self.metadata.tensors, *self.metadata.objects) if self.metadata else ()
        in_state = any("optimizer" in (form.state or {}) for form in self.forms.values())
        return in_state or any(_OPTIMIZER_ENTRY.match(entry) for entry in entries)

    @cached_property
    def parameters(self) -> int | None:
        """Number of weights, with the padding of the vocabulary."""
        return None if self.metadata is None else weights.count_parameters(self.metadata)

    @cached_property
    def dtypes(self) -> list[str]:
        """Names of the weights' dtypes, the most common first."""
        return [] if self.metadata is None else weights.dtypes(self.metadata)

    @property
    def as_saved(self) -> list[str]:
        """Flags without which Megatron-LM doesn't load a format that keeps how a training has split the weights."""
        return self.ranks.flags if self.ranks else list(SAVED_WITH.get(self.format or "", ()))

    @property
    def parallelism(self) -> dict[str, int] | None:
        """Parallel sizes with which it was saved, by their usual letters."""
        if self.args is None:
            return None
        sizes = {letters: getattr(self.args, name, None) for letters, name in _PARALLEL_SIZES.items()}
        return {letters: size for letters, size in sizes.items() if type(size) is int}

    def has(self, name: str) -> bool:
        """Return whether the folder has a file of this name."""
        return (self.path / name).is_file()


def examine_payload(path: Path, index: Path | None = None) -> Payload:
    """Read the metadata of a payload folder.

    The format is told as `_get_checkpoint_format` of Megatron-LM does (core 0.15 to 0.19). Core 0.18 and before write
    `common_backend` into `metadata.json`, core 0.19 doesn't (CheckpointingConfig in
    megatron/core/dist_checkpointing/core.py).

    Args:
        path: The folder.
        index: Its `.metadata`, if that lies elsewhere.
    """
    index = index or path / METADATA
    found = Payload(path)
    found.size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    config = _read_config(found)
    if config is None and any(path.glob(RANKS)):
        return replace(found, **read_ranks(path, found.damage))
    if config is not None:
        found.format = str(config.get("sharded_backend", "torch_dist"))[:20]
    if not index.is_file():
        found.damage.append(".metadata is missing: without it no weight can be found")
        return found
    try:
        found.metadata = read_metadata(index)
    except (UnreadablePickle, OSError) as error:
        found.damage.append(str(error))
        return found
    _check_shards(found, found.metadata)
    if config is None and "iteration" in found.metadata.objects:
        return replace(found, **read_entries(path, found.metadata, found.damage))
    if config is None:
        found.damage.append("metadata.json is missing: the save that wrote this was not finished")
    found.forms = read_forms(path, found.metadata, found.damage)
    if config and "common_backend" in config:
        found.core = "0.18 or earlier"
    elif COMMON_STATE in found.metadata.objects:
        found.core = "0.19 or later"
    return found


def refuse_damage(payload: Payload) -> None:
    """Raise a ValueError, with one remedy, if weights or the common state of a payload can't be read."""
    for damage in payload.damage[:1]:
        remedy = "" if damage.endswith(".") else "; copy or save the checkpoint again"
        raise ValueError(f"{payload.path} can't be loaded: {damage}{remedy}")


def _read_config(payload: Payload) -> dict[str, Any] | None:
    """Return `metadata.json`, None if there is none."""
    if not payload.has(METADATA_JSON):
        return None
    try:
        with (payload.path / METADATA_JSON).open("rb") as opened:
            config = json.loads(opened.read(1 << 20))
        if isinstance(config, dict):
            return config
    except (ValueError, RecursionError):
        pass
    payload.damage.append("metadata.json is no JSON object")
    return {}


def _check_shards(payload: Payload, metadata: Metadata) -> None:
    """Compare what `.metadata` says with the sizes of the files."""
    ends: dict[str, int] = {}
    for shard in metadata.shards:
        ends[shard.file] = max(ends.get(shard.file, 0), shard.offset + shard.length)
    sizes = {name: file.stat().st_size if (file := payload.path / name).is_file() else None for name in sorted(ends)}
    missing = [name for name, size in sizes.items() if size is None]
    short = [name for name, size in sizes.items() if size is not None and size < ends[name]]
    if missing:
        payload.damage.append(f"{_are(missing)} missing")
    for name in short[:3]:
        payload.damage.append(f"{name} is short: {sizes[name]:,} of {ends[name]:,} bytes")
    if short[3:]:
        payload.damage.append(f"{len(short) - 3} more files are short")
    stored = {shard.entry for shard in metadata.shards}
    if lost := sorted({*metadata.tensors, *metadata.objects} - stored):
        payload.damage.append(f".metadata does not say where {_are(lost)} stored")


def some(names: list[str]) -> str:
    """Return the first three of many names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _are(names: list[str]) -> str:
    return f"{some(names)} {'is' if len(names) == 1 else 'are'}"
