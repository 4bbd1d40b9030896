# SPDX-License-Identifier: Apache-2.0
"""Which payload of a checkpoint root a repair makes the release."""

from dataclasses import replace
from pathlib import Path

from megatron.bridge.release_checkpoint.examine import Checkpoint
from megatron.bridge.release_checkpoint.layout import BRIDGE_TRACKER, ITERATION_0, METADATA, RELEASE
from megatron.bridge.release_checkpoint.payload import Payload, examine_payload
from megatron.bridge.repair.steps import Refused


def choose(checkpoint: Checkpoint) -> tuple[Payload, Path | None]:
    """Return what becomes the release, and its `.metadata` if that lies in another folder.

    Raises:
        Refused: A repair would do harm, or would not help.
    """
    root, shown = checkpoint.root, checkpoint.payload
    if checkpoint.busy:
        raise Refused(f"an import or a repair of {root} is running: wait for it")
    if shown is not None and checkpoint.kind == "payload":
        raise Refused(f"{shown.path} is a payload folder, expected a root: pass {root}")
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
            f"{root} holds training iteration {checkpoint.iteration}, which a release checkpoint would hide: "
            "move the training checkpoints away, or pass another path"
        )
    names = sorted(checkpoint.folders, key=lambda name: name != RELEASE) or [shown.path.name]
    found = [shown if name == shown.path.name else examine_payload(root / name) for name in names]
    payload, index = _whole(checkpoint, found)
    if payload.damage:
        # Some say what to do.
        advice = "" if payload.damage[0].endswith(".") else ": import the model again"
        raise Refused(f"{payload.path.name}: {payload.damage[0]}{advice}")
    if payload.format != "torch_dist":
        raise Refused(
            f"{payload.path} has the format {payload.format}, a release checkpoint torch_dist: import the model"
        )
    _refuse_training(payload)
    return payload, index


_IMPORTED = "pass a checkpoint that was imported and not trained"


def _refuse_training(payload: Payload) -> None:
    if payload.has_optimizer:
        raise Refused(f"{payload.path} holds optimizer state, so it is a training checkpoint: {_IMPORTED}")
    for name in payload.forms:
        each = replace(payload, source=name)
        consumed = getattr(each.args, "consumed_train_samples", 0)
        if each.iteration > 0 or consumed:
            at = f"iteration {each.iteration}" if each.iteration else f"{consumed} samples"
            raise Refused(f"{payload.path} was trained up to {at}: {_IMPORTED}")


def _whole(checkpoint: Checkpoint, found: list[Payload]) -> tuple[Payload, Path | None]:
    """Choose the payload that is whole, alone or with the `.metadata` of another: `mv iter_0000000/*` leaves that."""
    first = found[0]
    if _is_older(checkpoint, found):
        raise Refused(
            f"{checkpoint.root} holds an older {RELEASE} beside {checkpoint.named}, which its tracker names, and both "
            "are complete: move away the one that you don't need"
        )
    if not first.damage:
        return first, None
    for other in found[1:]:
        if not other.damage and (checkpoint.named != RELEASE or _is_part(first.path, other.path)):
            return other, None
        index = other.path / METADATA
        if not first.has(METADATA) and index.is_file():
            completed = examine_payload(first.path, index)
            if not completed.damage:
                return completed, index
    return first, None


def _is_older(checkpoint: Checkpoint, found: list[Payload]) -> bool:
    """Return whether iteration 0 was saved after the release. An import would have removed Bridge's tracker."""
    whole = {each.path.name for each in found if not each.damage}
    is_saved_last = checkpoint.named == ITERATION_0 and (checkpoint.root / BRIDGE_TRACKER).is_file()
    return is_saved_last and {RELEASE, ITERATION_0} <= whole


def _is_part(part: Path, whole: Path) -> bool:
    """Return whether a folder is an unfinished copy of another one, by names and sizes."""
    for path in part.rglob("*"):
        other = whole / path.relative_to(part)
        if path.is_file() and not (other.is_file() and path.stat().st_size <= other.stat().st_size):
            return False
    return True
