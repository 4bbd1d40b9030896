# SPDX-License-Identifier: Apache-2.0
"""What lies at a path, read from metadata alone: no weights, no torch, and no pickle that runs."""

import errno
import json
import math
import os
import re
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint import metadata as reading
from megatron.bridge.release_checkpoint.metadata import Metadata, StoredTensor
from megatron.bridge.release_checkpoint.pickles import Inert, RefusedPickle, UnreadablePickle


RELEASE = "release"
ITERATION_0 = "iter_0000000"
STAGING = "release.incomplete"
REPLACED = "release.replaced"
TRACKER = "latest_checkpointed_iteration.txt"
LEFTOVERS = (STAGING, REPLACED, f"{TRACKER}.incomplete")
# A link to see whether links can be made.
TRIAL = f"{ITERATION_0}.incomplete"
BRIDGE_TRACKER = "latest_train_state.pt"
TRAIN_STATE = "train_state.pt"
RUN_CONFIG = "run_config.yaml"
COMMON_PT = "common.pt"
COMMON_STATE = "common_state/shard_0_1"
"""The entry that core 0.19 writes in place of `common.pt`. It reads that file first, where there is one
(load_common_state_dict in megatron/core/dist_checkpointing/serialization.py)."""
ENTRY = "entry"

FORMS = {COMMON_PT: COMMON_PT, ENTRY: "the entry common_state"}
"""Forms of the common state, in the order in which readers look for them, as people call them."""

# Args without which Megatron-LM builds another model, or none: the first that load_args_from_checkpoint and
# check_checkpoint_args read (megatron/training/checkpointing.py, core 0.15 to 0.19).
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

# State of a training, in the common state and, from a longer key on, as entries of the checkpoint.
TRAINING_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
_OPTIMIZER_ENTRY = re.compile(r"(chained_\d+\.)?optimizer\b")
# Characters of all args in print.
_MAX_ARGS = 4 << 20
_MAX_INT = (1 << 63) - 1
_NO_WEIGHT = re.compile(r"(chained_\d+\.)?optimizer\b|opt_param_scheduler|rng_state|rerun_state|common_state/")


@dataclass(frozen=True)
class CommonState:
    """One form of the common state, as it was found.

    Attributes:
        state: Its content, None if it is damaged.
        damage: What is wrong with it, None if nothing is.
    """

    state: dict[str, Any] | None = None
    damage: str | None = None


@dataclass
class Payload:
    """One folder of a checkpoint.

    Attributes:
        path: The folder.
        format: As `--ckpt-format` of Megatron-LM: "torch_dist", "torch_dcp", "torch"; None if it is none of them.
        core: Series of Megatron Core that wrote it, by what only that one writes; None if nothing tells.
        forms: The common state in each of `FORMS` that is there, in that order.
        source: Which of them `state` is; by itself the first that can be read.
        metadata: What `.metadata` says, None if there is none or it can't be read.
        size: Bytes of all files.
        damage: What is missing or broken, a line each, and has no double in the payload.
    """

    path: Path
    format: str | None = None
    core: str | None = None
    forms: dict[str, CommonState] = field(default_factory=dict)
    source: str | None = None
    metadata: Metadata | None = None
    size: int = 0
    damage: list[str] = field(default_factory=list)

    @property
    def common(self) -> str | None:
        """In which forms the common state is there: "common.pt", "entry", "both", or None."""
        return "both" if len(self.forms) > 1 else next(iter(self.forms), None)

    @property
    def state(self) -> dict[str, Any] | None:
        """The common state, None if there is none or it can't be read."""
        readable = (name for name, form in self.forms.items() if form.state is not None)
        name = self.source or next(readable, None)
        return self.forms[name].state if name is not None else None

    @cached_property
    def discord(self) -> list[str]:
        """In what the two forms of the common state differ, by name; nothing where one is missing or damaged."""
        states = [form.state for form in self.forms.values() if form.state is not None]
        return differences(*states) if len(states) > 1 else []

    @cached_property
    def args(self) -> Namespace | None:
        """Megatron-LM's args; values that are not plain are left out."""
        args = (self.state or {}).get("args")
        if not isinstance(args, Inert) or not isinstance(args.state, dict):
            return None
        plain, left, known = Namespace(), _MAX_ARGS, {}
        for name, value in args.state.items():
            size = _size_of_plain(value, known)
            if isinstance(name, str) and size is not None and size <= left:
                setattr(plain, name, value)
                left -= size
        return plain

    @cached_property
    def missing_args(self) -> list[str]:
        """Which of `ESSENTIAL_ARGS` are not there; all of them where there are no args."""
        args = self.args
        return [name for name in ESSENTIAL_ARGS if getattr(args, name, None) is None]

    @property
    def iteration(self) -> int:
        """The iteration in the common state, 0 where there is none."""
        iteration = (self.state or {}).get("iteration")
        return max(0, min(iteration, _MAX_INT)) if type(iteration) is int else 0

    @property
    def version(self) -> float | None:
        """`checkpoint_version`: below 2.0 Megatron-LM permutes the QKV weights on load."""
        version = (self.state or {}).get("checkpoint_version")
        return float(version) if type(version) in (int, float) and abs(version) <= _MAX_INT else None

    @cached_property
    def has_optimizer(self) -> bool:
        """Whether there is optimizer state: somebody's training."""
        entries = (*self.metadata.tensors, *self.metadata.objects) if self.metadata else ()
        in_state = any("optimizer" in (form.state or {}) for form in self.forms.values())
        return in_state or any(_OPTIMIZER_ENTRY.match(entry) for entry in entries)

    @cached_property
    def parameters(self) -> int | None:
        """Number of weights, with the padding of the vocabulary."""
        if self.metadata is None:
            return None
        shapes = (shape for name, (shape, _) in self.metadata.tensors.items() if not _NO_WEIGHT.match(name))
        return sum(math.prod(shape) for shape in shapes)

    @cached_property
    def dtypes(self) -> list[str]:
        """Names of the weights' dtypes, the commonest first."""
        counts: dict[str, int] = {}
        for name, (shape, dtype) in (self.metadata.tensors if self.metadata else {}).items():
            if not _NO_WEIGHT.match(name):
                counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
        return sorted(counts, key=counts.__getitem__, reverse=True)

    @property
    def parallelism(self) -> dict[str, int] | None:
        """Parallel sizes with which it was saved, by their usual letters."""
        if self.args is None:
            return None
        fields = {
            "TP": "tensor_model_parallel_size",
            "PP": "pipeline_model_parallel_size",
            "EP": "expert_model_parallel_size",
            "CP": "context_parallel_size",
        }
        sizes = {letters: getattr(self.args, name, None) for letters, name in fields.items()}
        return {letters: size for letters, size in sizes.items() if type(size) is int}

    def has(self, name: str) -> bool:
        """Return whether a file of this name lies in the folder."""
        return (self.path / name).is_file()


@dataclass
class Checkpoint:
    """What lies at a path.

    Attributes:
        root: The checkpoint root, which `--load` takes.
        kind: "root", "payload" (a payload folder was given, `root` is above it), "empty", "missing" or "file".
        tracker: Text of the tracker, None if there is none.
        folders: Names of the payload folders of the root; a link `iter_0000000` is none.
        link: Where `iter_0000000` leads if it is a symbolic link, None if it isn't.
        leftovers: Names of what a killed import or repair left in the root.
        busy: An import or a repair of this root is running, and what looks left is being written.
        payload: What Megatron-LM would load; where the tracker names nothing that is there, what a repair would use.
        named: The folder that the tracker names, whether it is there or not; None for a tracker of no meaning.
    """

    root: Path
    kind: str
    tracker: str | None = None
    folders: list[str] = field(default_factory=list)
    link: str | None = None
    leftovers: list[str] = field(default_factory=list)
    busy: bool = False
    payload: Payload | None = None
    named: str | None = None

    @property
    def iteration(self) -> int:
        """The highest iteration that tracker, folders or payload speak of: above 0 it is a training."""
        names = [*self.folders, *([self.named] if self.named else [])]
        numbers = [int(name[5:]) for name in names if name.startswith("iter_")]
        return max([*numbers, self.payload.iteration if self.payload else 0], default=0)

    @property
    def misled(self) -> str | None:
        """Where a link `iter_0000000` leads that is not the one to the release beside it; None if all is well."""
        return self.link if self.link != RELEASE else None

    @property
    def layout(self) -> str | None:
        """What it is by tracker and folder: "release", "iter" (iteration 0, as Bridge has it), "training", or None."""
        if self.payload is None:
            return None
        if self.iteration > 0 or self.payload.has_optimizer:
            return "training"
        found = self.payload.path.name
        return {RELEASE: "release", ITERATION_0: "iter"}.get(found) if found == self.named else None


def examine(path: Path) -> Checkpoint:
    """Look at a checkpoint root or a payload folder.

    Args:
        path: Any path; whether anything is there or not.

    Raises:
        OSError: It can't be read.
    """
    if not path.exists():
        return Checkpoint(path, "missing")
    if not path.is_dir():
        return Checkpoint(path, "file")
    if _is_payload(path):
        chosen = path.absolute()
        if chosen.name == ITERATION_0 and _link(chosen) == RELEASE:
            chosen = chosen.with_name(RELEASE)
        return _examine_root(chosen.parent, chosen)
    return _examine_root(path)


def _link(path: Path) -> str | None:
    """Return where a symbolic link leads, None where there is none."""
    return os.readlink(path) if path.is_symlink() else None


def _examine_root(root: Path, chosen: Path | None = None) -> Checkpoint:
    found = Checkpoint(root, "payload" if chosen else "root")
    found.link = _link(root / ITERATION_0)
    # As a link it is no second payload, and what lies outside of the root is none of this checkpoint's.
    linked = {ITERATION_0} if found.link is not None else set()
    names = sorted(entry.name for entry in os.scandir(root) if entry.name not in linked)
    found.folders = [name for name in names if (root / name).is_dir() and (name == RELEASE or _is_iteration(name))]
    found.leftovers = [name for name in names if name in LEFTOVERS or name == TRIAL and _link(root / TRIAL) == RELEASE]
    found.busy = STAGING in found.leftovers and _is_locked(root / STAGING)
    if (root / TRACKER).is_file():
        with (root / TRACKER).open("rb") as file:
            found.tracker = file.read(80).decode("utf-8", "replace").strip()
        if found.tracker == RELEASE:
            found.named = RELEASE
        elif re.fullmatch(r"[0-9]{1,18}", found.tracker):
            found.named = f"iter_{int(found.tracker):07d}"
    # A tracker that says 0 is led to the release by a link.
    candidates = [found.named, RELEASE, *reversed([name for name in found.folders if _is_iteration(name)]), REPLACED]
    there = [name for name in candidates if name and (name in found.folders or name in found.leftovers)]
    if chosen or there:
        found.payload = examine_payload(chosen or root / there[0])
    elif found.tracker is None and not found.leftovers:
        found.kind = "empty"
    return found


def _is_locked(folder: Path) -> bool:
    """Tell whether a process of this host holds `flock` on a folder, without trying: a lock could end an import."""
    try:
        inode = str(folder.stat().st_ino)
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(line.split()[-3].rpartition(":")[2] == inode for line in locks.splitlines() if " FLOCK " in line)


def _is_iteration(name: str) -> bool:
    return re.fullmatch(r"iter_[0-9]{7,18}", name) is not None


def _is_payload(path: Path) -> bool:
    # `is_checkpoint_iteration_directory` of Bridge, and Megatron-LM's legacy format.
    files = (RUN_CONFIG, TRAIN_STATE, "metadata.json", ".metadata", "common.pt")
    return any((path / name).is_file() for name in files) or _is_legacy(path)


def _is_legacy(path: Path) -> bool:
    return any(entry.name.startswith("mp_rank_0") for entry in os.scandir(path))


def examine_payload(path: Path, index: Path | None = None) -> Payload:
    """Read the metadata of a payload folder.

    The format is told as `_get_checkpoint_format` of Megatron-LM does (core 0.15 to 0.19). Core 0.18 and before write
    `common_backend` into `metadata.json`, core 0.19 doesn't (CheckpointingConfig in
    megatron/core/dist_checkpointing/core.py).

    Args:
        path: The folder.
        index: Its `.metadata`, where that lies elsewhere.
    """
    index = index or path / ".metadata"
    found = Payload(path)
    found.size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    config = _read_config(found)
    if config is None and _is_legacy(path):
        found.format = "torch"
        return found
    if config is not None:
        found.format = str(config.get("sharded_backend", "torch_dist"))[:20]
    if not index.is_file():
        found.damage.append(".metadata is missing: without it no weight can be found")
        return found
    try:
        found.metadata = reading.read_metadata(index)
    except (UnreadablePickle, OSError) as error:
        found.damage.append(str(error))
        return found
    _check_shards(found, found.metadata)
    if config is None and "iteration" in found.metadata.objects:
        # FSDP's formats, which keep args and iteration as entries.
        found.format = "torch_dcp"
        return found
    if config is None:
        found.damage.append("metadata.json is missing: the save that wrote this was not finished")
    _read_common_state(found, found.metadata)
    if config and "common_backend" in config:
        found.core = "0.18 or earlier"
    elif COMMON_STATE in found.metadata.objects:
        found.core = "0.19 or later"
    return found


def _read_config(payload: Payload) -> dict[str, Any] | None:
    """Return `metadata.json`, None where there is none."""
    file = payload.path / "metadata.json"
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
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
        payload.damage.append(f"{_some(missing)} missing")
    for name in short[:3]:
        payload.damage.append(f"{name} is short: {sizes[name]:,} of {ends[name]:,} bytes")
    if short[3:]:
        payload.damage.append(f"{len(short) - 3} more files are short")
    stored = {shard.entry for shard in metadata.shards}
    lost = sorted({*metadata.tensors, *metadata.objects} - stored)
    if lost:
        payload.damage.append(f".metadata says of {_some(lost)} not where to find it")


def _some(names: list[str]) -> str:
    """Name some of many."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}" if shown else ""


def _read_common_state(payload: Payload, metadata: Metadata) -> None:
    """Read the common state in each form that is there.

    What one form has lost the other may have. A pickle that names a foreign class, and a file that the system doesn't
    let one read, are the user's to judge, whatever the other form says.
    """
    shard = next((shard for shard in metadata.shards if shard.entry == COMMON_STATE), None)
    file = payload.path / COMMON_PT
    # To a link that leads nowhere all readers say that the file is not there.
    if file.exists():
        payload.forms[COMMON_PT] = _form(payload, file)
    if shard is not None:
        payload.forms[ENTRY] = _form(payload, payload.path / shard.file, shard.offset, shard.length)
    if not payload.forms:
        payload.damage.append("there is neither common.pt nor the entry common_state: the checkpoint is not whole")
    elif all(form.damage for form in payload.forms.values()) and not payload.damage:
        payload.damage += [f"{form.damage}. Copy or download the checkpoint again." for form in payload.forms.values()]


def _form(payload: Payload, file: Path, offset: int = 0, length: int | None = None) -> CommonState:
    if not file.exists():
        # It is named already, as a shard.
        return CommonState(damage=f"{file} is missing")
    try:
        if not file.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        state = reading.read_common_state(file, offset, length)
        if length is not None and isinstance(state, list) and len(state) == 1:
            state = state[0]
        if not isinstance(state, dict):
            raise UnreadablePickle(file, f"the common state is a {type(state).__name__}, expected a dict")
        return CommonState(state)
    except RefusedPickle as error:
        payload.damage.append(str(error))
    except UnreadablePickle as error:
        return CommonState(damage=error.finding)
    except OSError as error:
        payload.damage.append(f"{file} can't be read ({error.strerror}): mend that first")
    return CommonState(damage=payload.damage[-1])


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Compare two common states.

    Returns:
        Names of the keys that differ, each of the args with `args.` in front, sorted.
    """
    pairs = [("", one, other)]
    if all(isinstance(state.get("args"), Inert) and isinstance(state["args"].state, dict) for state in (one, other)):
        pairs.append(("args.", one["args"].state, other["args"].state))
    named = []
    for prefix, left, right in pairs:
        for key in {**left, **right}:
            apart = key not in left or key not in right or not _same(left[key], right[key])
            if apart and not (len(pairs) > 1 and not prefix and key == "args"):
                named.append(f"{prefix}{key}")
    return sorted(named)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values of pickles are equal, without recursion: a hostile one is nested without end."""
    seen, left = set(), [(one, other)]
    while left:
        a, b = left.pop()
        if type(a) is not type(b):
            return False
        if isinstance(a, Inert):
            left += [(a.args, b.args), (a.state, b.state)]
        elif isinstance(a, (dict, list, tuple)):
            if (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            if len(a) != len(b) or isinstance(a, dict) and a.keys() != b.keys():
                return False
            left += [(a[key], b[key]) for key in a] if isinstance(a, dict) else zip(a, b, strict=True)
        # NaN is not equal to itself.
        elif a != b and (a == a or b == b):
            return False
    return True


def is_plain(state: dict[str, Any]) -> bool:
    """Tell whether a common state has no class but argparse.Namespace and those of torch: all that a release's has."""
    seen, left = set(), [state]
    while left:
        each = left.pop()
        if isinstance(each, Inert) and not isinstance(each, StoredTensor):
            if each.name != "argparse.Namespace":
                return False
            left += [each.args, each.state]
        elif isinstance(each, type) and not each.__dict__.get("name", "").startswith("torch."):
            return False
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            left += each.values() if isinstance(each, dict) else each
    return True


def _size_of_plain(value: Any, known: dict[int, int | None], depth: int = 0) -> int | None:
    """Return about how many characters a value has in print, None where it is not plain.

    Args:
        value: A value of the args.
        known: What was found of lists, by their id: those of a hostile file could be in a million places.
        depth: Lists around the value.
    """
    if isinstance(value, (list, tuple)):
        # One list in another is all there is in args.
        if depth > 1 or len(value) > 1000:
            return None
        if id(value) not in known:
            sizes = [_size_of_plain(each, known, depth + 1) for each in value]
            known[id(value)] = None if None in sizes else sum(sizes, 2)
        return known[id(value)]
    if isinstance(value, str):
        return len(value) + 2
    # JSON has no infinity.
    is_number = isinstance(value, int) and abs(value) <= _MAX_INT or isinstance(value, float) and math.isfinite(value)
    return 24 if value is None or is_number else None


# --- args and weights ------------------------------------------------------------------------------------------------

# A stack of layers is one tensor with a dimension for them in front, unless the layers differ among each other.
_LAYER = re.compile(r"(?:model\d*\.)?decoder\.layers\.(?:(\d+)\.)?(.+)")
# Args of models whose layers are not counted, or not sized, as those of a GPT.
_UNLIKE = (
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "spec",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
)
_EMBEDDING = re.compile(r"(?:model\d*\.)?embedding\.word_embeddings\.weight")


def contradictions(args: Namespace | None, metadata: Metadata) -> list[str]:
    """Compare args with the shapes of the weights, by the names of Megatron Core's GPT model.

    Args:
        args: Megatron-LM's args.
        metadata: What `.metadata` says.

    Returns:
        What differs, each as a field with both values. Of what is not known here, or not in both, nothing.
    """
    if args is None:
        return []

    def given(name: str) -> int | None:
        value = getattr(args, name, None)
        return value if type(value) is int else None

    shapes = {name: shape for name, (shape, _) in metadata.tensors.items() if not _NO_WEIGHT.match(name)}
    # name: (what the args say, what the weights may mean by it)
    compared: dict[str, tuple[int | None, set[int]]] = {}
    for shape in (shape for name, shape in shapes.items() if _EMBEDDING.fullmatch(name) and len(shape) == 2):
        compared["padded_vocab_size"] = given("padded_vocab_size"), {shape[0]}
        compared["hidden_size"] = given("hidden_size"), {shape[1]}
    unlike = any(getattr(args, name, None) for name in _UNLIKE) or any(name.startswith("encoder.") for name in shapes)
    layers = [(found, shape) for name, shape in shapes.items() if (found := _LAYER.fullmatch(name)) and not unlike]
    numbered = {int(found[1]) for found, _ in layers if found[1]}
    stacked = {shape[0] for found, shape in layers if not found[1] and shape}
    if numbered and not stacked:
        compared["num_layers"] = given("num_layers"), {max(numbered) + 1}
    elif len(stacked) == 1 and not numbered:
        compared["num_layers"] = given("num_layers"), stacked

    def rows(weight: str, dimension: int = -2) -> set[int]:
        return {shape[dimension] for found, shape in layers if found[2] == weight and len(shape) >= -dimension}

    gated = bool(getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False))
    for field_name, weight in (
        ("ffn_hidden_size", "mlp.linear_fc1.weight"),
        ("moe_ffn_hidden_size", "mlp.experts.experts.linear_fc1.weight"),
    ):
        found = rows(weight)
        # Megatron-LM has no arg for each activation with a gate.
        compared[field_name] = given(field_name), {size // 2 for size in found} | (set() if gated else found)
    # Routers and what they route to: of a dense model neither is there, and its args say None.
    experts = rows("mlp.router.weight")
    if experts and hasattr(args, "num_experts"):
        compared["num_experts"] = given("num_experts") or 0, experts
    elif layers and given("num_experts") and not any("expert" in found[2] for found, _ in layers):
        compared["num_experts"] = given("num_experts"), {0}
    heads, size = given("num_attention_heads"), given("kv_channels")
    grouped = getattr(args, "group_query_attention", None)
    if heads and size and grouped is not None and not getattr(args, "multi_latent_attention", False):
        groups = given("num_query_groups") if grouped else heads
        # A gate of the attention's output has as many rows as the queries.
        wanted = {(heads * queries + 2 * groups) * size for queries in (1, 2)} if groups else set()
        found = rows("self_attention.linear_qkv.weight")
        if found and wanted and not found & wanted:
            compared["rows of linear_qkv"] = min(wanted), found
    return [
        f"{name} is {value} by the args and {' or '.join(map(str, sorted(found)))} in the weights"
        for name, (value, found) in compared.items()
        if value is not None and found and value not in found
    ]
