# SPDX-License-Identifier: Apache-2.0
"""Turns what `import_ckpt` used to write, and what people have half mended, into a release checkpoint, in place.

Every step is one rename, one removal, or one replacement of a small file, so a crash leaves a checkpoint that another
run completes: it looks again at what is there. The steps stand in such an order that the tracker never names something
unreadable. The weights are neither read nor copied.
"""

import errno
import fcntl
import io
import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint.files import sync, write_new
from megatron.bridge.release_checkpoint.metadata import read_metadata_of_torch
from megatron.bridge.release_checkpoint.pickles import Inert
from megatron.bridge_cli.checkpoint import (
    BRIDGE_TRACKER,
    COMMON_PT,
    COMMON_STATE,
    ENTRY,
    FORMS,
    ITERATION_0,
    RELEASE,
    REPLACED,
    RUN_CONFIG,
    STAGING,
    TRACKER,
    TRAIN_STATE,
    TRAINING_STATE,
    Checkpoint,
    Payload,
    contradictions,
    differences,
    examine,
    examine_payload,
    is_plain,
)


ASIDE = "release.damaged"
INTEGRITY = "integrity.json"
_PARTIAL = ".incomplete"
# What the common state of a release says, whatever it said before.
_SET = {"checkpoint_version": 3.0, "iteration": 0}


class Refused(ValueError):
    """A checkpoint that a repair must not touch."""


class NeedsModel(Refused):
    """A checkpoint that a repair can't complete without the Hugging Face model that it came from."""


@dataclass(frozen=True)
class Step:
    """One step of a repair: what it does, in words, and the function that does it."""

    what: str
    do: Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What makes a release checkpoint of a root.

    Attributes:
        root: The checkpoint root.
        payload: What becomes the release, or is it.
        steps: In order; none where nothing is to be done.
        index: Where the payload's `.metadata` lies, if not in its folder.
        aside: Whether something that is not whole lies at `release`, and goes out of the way.
        hf_model: As given to `plan`.
        trust_remote_code: As given to `plan`.
    """

    root: Path
    payload: Payload
    steps: tuple[Step, ...]
    index: Path | None
    aside: bool
    hf_model: str | None
    trust_remote_code: bool


def plan(root: Path, hf_model: str | None = None, trust_remote_code: bool = False) -> Plan:
    """Look at a checkpoint root and say what makes it a release checkpoint. Changes nothing.

    Args:
        root: Checkpoint root.
        hf_model: Hugging Face model to take the args from, in place of `run_config.yaml`.
        trust_remote_code: Run the model's own code, as `import_ckpt` does with the same word.

    Raises:
        Refused: It is a training, it is damaged, or there is nothing to take the args from.
        OSError: It can't be read.
    """
    return _plan(examine(root), hf_model, trust_remote_code)


def foresee(checkpoint: Checkpoint) -> Plan | None:
    """Return the plan for what was examined, None where a repair refuses.

    Where it takes a Hugging Face model that nothing here names, `hf_model` of the plan is "MODEL".
    """
    try:
        if checkpoint.kind == "payload":
            checkpoint = examine(checkpoint.root)
        try:
            return _plan(checkpoint)
        except NeedsModel:
            return _plan(checkpoint, "MODEL")
    except (Refused, OSError):
        return None


def _plan(checkpoint: Checkpoint, hf_model: str | None = None, trust_remote_code: bool = False) -> Plan:
    root, release = checkpoint.root, checkpoint.root / RELEASE
    payload, index = _payload(checkpoint)
    steps = []
    if index is not None:
        steps.append(_completion(payload.path / ".metadata", index))
    steps += _steps_of_state(payload, hf_model, trust_remote_code)
    if (root / BRIDGE_TRACKER).is_file():
        steps.append(_removal(root / BRIDGE_TRACKER, "Bridge's tracker of a training"))
    named = checkpoint.named
    aside = payload.path != release and os.path.lexists(release)
    if aside and _is_empty(release):
        steps.append(_removal_of_empty(release))
    elif aside:
        name = _free_name(root, ASIDE)
        why = "it is not whole; it can be removed once all is well"
        steps.append(Step(f"rename {RELEASE} to {name} ({why})", lambda: _rename(release, root / name)))
    if payload.path != release:
        if named == payload.path.name:
            steps.append(_removal(root / TRACKER, f"it names {named}, which is about to move"))
            named = None
        steps.append(Step(f"rename {payload.path.name} to {RELEASE}", lambda: _rename(payload.path, release)))
    if payload.has(TRAIN_STATE):
        steps.append(
            _removal(release / TRAIN_STATE, "a release has no training state", shown=f"{RELEASE}/{TRAIN_STATE}")
        )
    if named != RELEASE:
        steps.append(Step(f"write {RELEASE} into the tracker", lambda: _replace(root / TRACKER, RELEASE.encode())))
    moved = REPLACED if payload.path.name == REPLACED else None
    steps += [
        _removal(root / name, "left by an import that was killed") for name in checkpoint.leftovers if name != moved
    ]
    others = [root / name for name in checkpoint.folders if name not in (RELEASE, payload.path.name)]
    steps += [_removal_of_empty(folder) for folder in others if _is_empty(folder, but=index)]
    # Left by a repair that was killed: the file lies in the payload, wherever that is by then.
    partial = [
        path.name
        for path in sorted(payload.path.iterdir())
        if path.name.endswith(_PARTIAL) and (path.is_file() or path.is_symlink())
    ]
    steps += [_removal(release / name, "left by a repair that was killed") for name in partial]
    return Plan(root, payload, tuple(steps), index, aside, hf_model, trust_remote_code)


def run(plan: Plan, on_step: Callable[[Step], None] = lambda step: None) -> None:
    """Do the steps of a plan, under the lock that an import takes.

    Args:
        plan: From `plan`.
        on_step: Called before each step.

    Raises:
        Refused: An import or another repair is at work, or was since the plan was made.
        OSError: It can't be written to; what is done is done, and another run does the rest.
    """
    if not plan.steps:
        return
    staging = plan.root / STAGING
    left = os.path.lexists(staging)
    lock = _lock(staging)
    try:
        found = examine(plan.root)
        # Both are this repair's own.
        found.busy = False
        found.leftovers = [name for name in found.leftovers if name != STAGING or left]
        now = _plan(found, plan.hf_model, plan.trust_remote_code)
        if [step.what for step in now.steps] != [step.what for step in plan.steps]:
            raise Refused(f"{plan.root} has changed since this repair looked at it: run the command again")
        for step in now.steps:
            on_step(step)
            step.do()
    finally:
        if not left:
            # Where it can't be, the next run does it.
            with suppress(OSError):
                _act(staging.rmdir)
        os.close(lock)


def _payload(checkpoint: Checkpoint) -> tuple[Payload, Path | None]:
    """Return what shall be the release, and where its `.metadata` lies if that is not in its folder.

    Raises:
        Refused: A repair could do harm, or no good.
    """
    root, shown = checkpoint.root, checkpoint.payload
    if checkpoint.busy:
        raise Refused(f"an import or a repair of {root} is running: wait for it")
    if checkpoint.kind == "payload":
        raise Refused(f"{shown.path} is a folder of a checkpoint: give the root, {root}")
    if checkpoint.misled is not None:
        raise Refused(
            f"{root / ITERATION_0} is a link to {checkpoint.misled[:200]}, expected one to {RELEASE}, or none: remove "
            "the link, or put what it leads to in its place"
        )
    if shown is None:
        left = " but what a killed import left" if checkpoint.leftovers else ""
        raise Refused(f"{root} holds no checkpoint{left}: import the model")
    if checkpoint.iteration > 0:
        raise Refused(
            f"{root} holds training iteration {checkpoint.iteration}, a release would hide it: "
            "nothing is repaired here; move the training away, or give another path"
        )
    names = sorted(checkpoint.folders, key=lambda name: name != RELEASE) or [shown.path.name]
    found = [shown if name == shown.path.name else examine_payload(root / name) for name in names]
    payload, index = _whole(checkpoint, found)
    if payload.damage:
        raise Refused(f"{payload.path.name}: {payload.damage[0]}: import the model again")
    if payload.format != "torch_dist":
        raise Refused(
            f"{payload.path} has the format {payload.format}, a release checkpoint torch_dist: import the model"
        )
    if payload.has_optimizer:
        raise Refused(f"{payload.path} holds optimizer state: it is a training, and none is made a release here")
    for name in payload.forms:
        each = replace(payload, source=name)
        consumed = getattr(each.args, "consumed_train_samples", 0)
        if each.iteration > 0 or consumed:
            at = f"iteration {each.iteration}" if each.iteration else f"{consumed} samples"
            raise Refused(f"{payload.path} was trained up to {at}: none of a training is made a release here")
    return _truth(payload), index


def _whole(checkpoint: Checkpoint, found: list[Payload]) -> tuple[Payload, Path | None]:
    """Choose the payload that is whole, or is with the `.metadata` of the other: `mv iter_0000000/*` leaves that."""
    first = found[0]
    if _is_older(checkpoint, found):
        raise Refused(
            f"{checkpoint.root} holds an older {RELEASE} beside {checkpoint.named}, which its tracker names, and both "
            "are whole: move away the one that is not wanted"
        )
    if not first.damage:
        return first, None
    for other in found[1:]:
        if not other.damage and (checkpoint.named != RELEASE or _is_part(first.path, other.path)):
            return other, None
        index = other.path / ".metadata"
        if not first.has(".metadata") and index.is_file():
            completed = examine_payload(first.path, index)
            if not completed.damage:
                return completed, index
    return first, None


def _is_older(checkpoint: Checkpoint, found: list[Payload]) -> bool:
    """Whether iteration 0 was saved over a release: an import removes Bridge's tracker before it publishes one."""
    whole = {each.path.name for each in found if not each.damage}
    is_saved_last = checkpoint.named == ITERATION_0 and (checkpoint.root / BRIDGE_TRACKER).is_file()
    return is_saved_last and {RELEASE, ITERATION_0} <= whole


def _is_part(part: Path, whole: Path) -> bool:
    """Whether a folder is a copy of another one that was not finished, by names and sizes."""
    for path in part.rglob("*"):
        other = whole / path.relative_to(part)
        if path.is_file() and not (other.is_file() and path.stat().st_size <= other.stat().st_size):
            return False
    return True


def _is_empty(folder: Path, but: Path | None = None) -> bool:
    return folder.is_dir() and not folder.is_symlink() and all(path == but for path in folder.iterdir())


def _free_name(root: Path, name: str) -> str:
    names = (name, *(f"{name}.{number}" for number in range(1, 1000)))
    return next(each for each in names if not os.path.lexists(root / each))


# --- common state ----------------------------------------------------------------------------------------------------


def _steps_of_state(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> list[Step]:
    """Give the common state what a release's has, the same in both forms.

    `common.pt` first, which all readers take where it is there: between the two steps it says what is right, and the
    entry what was there before. The next repair tells them apart by the same rule as this one (`_truth`).
    """
    hashes = f", without {INTEGRITY}, whose hashes go wrong" if payload.has(INTEGRITY) else ""
    stale = [name for name in FORMS if name != payload.source and _differs(payload, name)]
    rewritten = hashes if COMMON_PT in payload.forms else ""
    mended = _state_fault(payload) or _lacking(payload)
    steps = []
    if (mended or stale) and not is_plain({**_kept_plain(payload.state), "args": None}):
        raise Refused(
            f"{payload.path}: the common state holds objects, expected numbers, text, lists and dicts: import the "
            "model again"
        )
    if mended or stale and not is_plain(payload.state):
        source = _source_of_args(payload, hf_model)
        what = f"write Megatron-LM's args, from {source}, into common.pt{rewritten}"
        steps.append(Step(what, lambda: _write_state(payload, hf_model, trust_remote_code)))
        stale = [ENTRY] if ENTRY in payload.forms else []
    elif COMMON_PT in stale:
        what = f"write common.pt, which Megatron-LM looks for first, from {FORMS[ENTRY]}{rewritten}"
        steps.append(Step(what, lambda: _write_common_pt(payload, _load_state(payload))))
    if ENTRY in stale:
        what = f"write common.pt into {FORMS[ENTRY]}, by a new .metadata{hashes}"
        steps.append(Step(what, lambda: _write_entry(payload)))
    return steps


def _differs(payload: Payload, name: str) -> bool:
    """Whether a form of the common state is to be written from the other one; no release is without `common.pt`."""
    if name not in payload.forms:
        return name == COMMON_PT
    state = payload.forms[name].state
    return state is None or bool(differences(state, payload.state))


def _lacking(payload: Payload) -> dict[str, str]:
    """Return what the form that a repair goes by lacks and the other has, by name, with the form that has it."""
    others = {name: form.state for name, form in payload.forms.items() if form.state and name != payload.source}
    return {key: name for name, state in others.items() for key in _kept(state) if key not in payload.state}


def _truth(payload: Payload) -> Payload:
    """Return the payload with the form of the common state that a repair goes by.

    Raises:
        Refused: The two differ in what a repair doesn't set, and nothing tells which is right.
    """
    found = [replace(payload, source=name) for name, form in payload.forms.items() if form.state is not None]
    ranks = [(not _args_fault(each), each.args is not None) for each in found]
    best = found[ranks.index(max(ranks))]
    kept = [_kept_plain(each.state) for each, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    # What only one has is kept.
    shared = [{key: value for key, value in each.items() if key in kept[-1] and key in kept[0]} for each in kept]
    if differing := [name for other in shared[1:] for name in differences(shared[0], other)]:
        what = ", ".join(differing[:3])
        raise Refused(
            f"{payload.path}: common.pt and {FORMS[ENTRY]} differ in {what}, and the weights don't tell which is "
            "right: remove common.pt if it is wrong, else import the model again"
        )
    return best


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    """Return a common state without what a repair leaves out or sets."""
    return {key: value for key, value in state.items() if key not in (*TRAINING_STATE, *_SET)}


def _kept_plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a common state that was read by stand-ins as `_kept` does, and of its args what a release has."""
    kept = _kept(state)
    if isinstance(args := kept.get("args"), Inert) and isinstance(args.state, dict):
        kept["args"] = Inert()
        kept["args"].state = {key: value for key, value in args.state.items() if is_plain({"": value})}
    return kept


def _args_fault(payload: Payload) -> bool:
    return bool(payload.missing_args or contradictions(payload.args, payload.metadata))


def _state_fault(payload: Payload) -> bool:
    """Whether the common state differs from a release's in what Megatron-LM reads."""
    state = payload.state
    training = any(key in state for key in TRAINING_STATE)
    return _args_fault(payload) or payload.version != 3.0 or state.get("iteration") != 0 or training


def _source_of_args(payload: Payload, hf_model: str | None) -> str:
    if hf_model is not None:
        return str(hf_model)
    if payload.has(RUN_CONFIG):
        return RUN_CONFIG
    wrong = contradictions(payload.args, payload.metadata)
    if not payload.missing_args and not wrong:
        return "itself"
    args = f"args that fit its weights ({wrong[0]})" if wrong else "args"
    raise NeedsModel(
        f"{payload.path} has neither {args} nor {RUN_CONFIG} to take them from: give the model it was imported from "
        "with --hf-model"
    )


def _write_state(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> None:
    """Write into `common.pt` what a release's has, as `prepare_release_state_dict` of Bridge does for an import."""
    state = _load_state(payload)
    for key, name in _lacking(payload).items():
        state[key] = _load_state(replace(payload, source=name))[key]
    if _args_fault(payload):
        derived = _derive_args(payload, hf_model, trust_remote_code)
        given = vars(state["args"]) if payload.args is not None else {}
        args = Namespace(**(vars(derived) | {k: v for k, v in given.items() if v is not None}))
        wrong = contradictions(args, payload.metadata)
        state["args"] = Namespace(**(given | vars(derived))) if wrong else args
    # Others are instances of classes, which not everybody's `weights_only` knows.
    state["args"] = Namespace(**{k: v for k, v in vars(state["args"]).items() if _is_plain_value(v)})
    _write_common_pt(payload, {**_kept(state), **_SET})


def _is_plain_value(value: Any) -> bool:
    import torch

    if isinstance(value, (list, tuple)):
        return all(_is_plain_value(each) for each in value)
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def _write_common_pt(payload: Payload, state: dict[str, Any]) -> None:
    import torch

    data = io.BytesIO()
    torch.save(state, data)
    if COMMON_PT in payload.forms:
        _drop_hashes(payload)
    _replace(payload.path / COMMON_PT, data.getvalue())


def _write_entry(payload: Payload) -> None:
    """Write into the entry what `common.pt` holds by now."""
    import torch

    data = io.BytesIO()
    torch.save([_load_state(replace(payload, source=COMMON_PT))], data)
    _drop_hashes(payload)
    _replace_entry(payload, data.getvalue())


def _drop_hashes(payload: Payload) -> None:
    """Remove the manifest of hashes, which names files that are about to change."""
    if payload.has(INTEGRITY):
        _act((payload.path / INTEGRITY).unlink)
        sync(payload.path)


def _load_state(payload: Payload) -> dict[str, Any]:
    """Load the common state by torch, with `weights_only`, of a file that `safe_pickle` has read."""
    from types import SimpleNamespace

    import torch

    source = payload.source or next(name for name, form in payload.forms.items() if form.state is not None)
    name, offset, length = _file_of_state(payload, source)
    with (payload.path / name).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    try:
        from megatron.core.safe_globals import SAFE_GLOBALS as known
    except ImportError:  # core 0.13 and before
        known = []
    # For good, as megatron.core does when it is imported: torch's context manager would take away what that has added.
    torch.serialization.add_safe_globals([Namespace, SimpleNamespace, *known])
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise Refused(f"{payload.path}: the common state can't be read: {str(error).splitlines()[0]}") from None
    return state if source == COMMON_PT else state[0]


def _file_of_state(payload: Payload, source: str) -> tuple[str, int, int]:
    if source == COMMON_PT:
        return COMMON_PT, 0, -1
    shard = next(shard for shard in payload.metadata.shards if shard.entry == COMMON_STATE)
    return shard.file, shard.offset, shard.length


def _derive_args(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> Any:
    """Return the args that an import of this model writes, by Bridge's own model provider."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.release_checkpoint.args import megatron_lm_args
    from megatron.bridge.training.model_load_save import load_model_config

    if hf_model is None:
        provider, _ = load_model_config(str(payload.path))
    else:
        bridge = AutoBridge.from_hf_pretrained(hf_model, trust_remote_code=trust_remote_code)
        provider = bridge.to_megatron_provider(load_weights=False)
        provider.bf16, provider.fp16 = (payload.dtypes[:1] == [dtype] for dtype in ("bfloat16", "float16"))
        provider.finalize()
    args = megatron_lm_args(provider)
    if wrong := contradictions(args, payload.metadata):
        raise Refused(
            f"{payload.path} is no checkpoint of {hf_model or f'the model in its {RUN_CONFIG}'}, {wrong[0]}: "
            "give the model that was imported with --hf-model"
        )
    return args


def _replace_entry(payload: Payload, data: bytes) -> None:
    """Put the common state into a file of its own, and let `.metadata` point there.

    PyTorch's reader goes by `storage_data` of `.metadata` (FileSystemReader.read_data in
    torch/distributed/checkpoint/filesystem.py, 2.11): file, offset, length. The old bytes stay where they are, between
    weights, and nobody reads them.
    """
    path = payload.path / ".metadata"
    metadata = read_metadata_of_torch(path)
    used = {info.relative_path for info in metadata.storage_data.values()}
    name = next(name for number in range(len(used) + 1) if (name := f"__0_{number}.distcp") not in used)
    _replace(payload.path / name, data)
    for index, info in metadata.storage_data.items():
        if index.fqn == COMMON_STATE:
            metadata.storage_data[index] = type(info)(name, 0, len(data))
    _replace(path, pickle.dumps(metadata))
    for orphan in used - {info.relative_path for info in metadata.storage_data.values()}:
        _act(os.unlink, payload.path / orphan)


# --- files -----------------------------------------------------------------------------------------------------------


def _act(function: Callable, *arguments: Any) -> None:
    """Change something in the file system. All changes come through here, so that a test can die at each."""
    function(*arguments)


def _replace(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and flush it to the disk before it takes the place of the old one."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        _act(write_new, partial, data)
        if path.exists():
            shutil.copymode(path, partial)
        _act(partial.replace, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _rename(source: Path, target: Path) -> None:
    _act(source.rename, target)
    sync(target.parent)


def _removal(path: Path, why: str, shown: str | None = None) -> Step:
    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            _act(shutil.rmtree, path)
        elif os.path.lexists(path):
            _act(path.unlink)
        sync(path.parent)

    return Step(f"remove {shown or path.name} ({why})", remove)


def _removal_of_empty(folder: Path) -> Step:
    return Step(f"remove {folder.name} (it is empty)", lambda: _act(folder.rmdir))


def _completion(target: Path, index: Path) -> Step:
    """Take a `.metadata` from a folder that has nothing else, or a copy from one that may be a checkpoint."""
    what = f"{index.parent.name}/.metadata to {target.parent.name}"
    if _is_empty(index.parent, but=index):
        return Step(f"move {what}", lambda: _rename(index, target))
    return Step(f"copy {what}", lambda: _replace(target, index.read_bytes()))


def _lock(staging: Path) -> int:
    """Lock the folder that an import stages into, as `stage_release` of Bridge does; made if need be."""
    busy = f"an import or a repair of {staging.parent} is running: wait for it"
    if staging.is_symlink() or staging.is_file():
        _act(staging.unlink)
    _act(lambda: staging.mkdir(exist_ok=True))
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise Refused(busy) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.lexists(staging) or not os.path.samestat(os.stat(staging), os.fstat(descriptor)):
            # It was published, or removed, between opening and locking.
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(busy) from None
    except OSError as error:
        # Some network file systems have no locks.
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF):
            os.close(descriptor)
            raise
    return descriptor
