# SPDX-License-Identifier: Apache-2.0
"""Turn what `import_ckpt` used to write, and what people have half repaired by hand, into a release checkpoint.

Every step is one rename, one removal, or one replacement of a small file. After a crash, another run looks at what is
there and completes the repair. The order of the steps is such that the tracker never names something unreadable. No
weight is read or copied.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.release_checkpoint.examine import Checkpoint, examine
from megatron.bridge.release_checkpoint.files import Staging
from megatron.bridge.release_checkpoint.layout import (
    BRIDGE_TRACKER,
    INCOMPLETE,
    METADATA,
    RELEASE,
    TRACKER,
    TRAIN_STATE,
)
from megatron.bridge.release_checkpoint.leftovers import refuse_second
from megatron.bridge.release_checkpoint.payload import Payload
from megatron.bridge.repair import steps as actions
from megatron.bridge.repair.choice import choose
from megatron.bridge.repair.state import steps_of_state, truth
from megatron.bridge.repair.steps import (
    NeedsModel,
    Refused,
    Step,
    completion,
    free_name,
    is_empty,
    removal,
    removal_of_empty,
    rename,
    replace,
)


ASIDE = "release.damaged"


@dataclass(frozen=True)
class Plan:
    """The steps that make a release checkpoint of a root.

    Attributes:
        root: The checkpoint root.
        payload: What becomes the release, or is it.
        steps: The steps in order. None if the root is a release checkpoint.
        index: The payload's `.metadata` if that lies in another folder.
        aside: Whether an incomplete folder `release` is renamed.
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
    """Look at a checkpoint root and return what makes it a release checkpoint. Changes nothing.

    Args:
        root: Checkpoint root.
        hf_model: Hugging Face model to take the args from. Default: `run_config.yaml`.
        trust_remote_code: Run the code that comes with the Hugging Face model.

    Raises:
        Refused: It is a training, it is damaged, or there is nothing to take the args from.
        OSError: It can't be read.
    """
    return _plan(examine(root), hf_model, trust_remote_code)


def foresee(checkpoint: Checkpoint) -> Plan | None:
    """Return the plan for a checkpoint, None if a repair refuses it.

    If the repair needs a Hugging Face model, `hf_model` of the plan is "MODEL".
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
    release = checkpoint.root / RELEASE
    payload, index = choose(checkpoint)
    payload = truth(payload)
    aside = payload.path != release and os.path.lexists(release)
    steps = []
    if index is not None:
        steps.append(completion(payload.path / METADATA, index))
    steps += steps_of_state(payload, hf_model, trust_remote_code)
    steps += _publication(checkpoint, payload)
    steps += _removals(checkpoint, payload, index)
    return Plan(checkpoint.root, payload, tuple(steps), index, aside, hf_model, trust_remote_code)


def _publication(checkpoint: Checkpoint, payload: Payload) -> list[Step]:
    """Return the steps that make a payload the release which the tracker names."""
    root, release, named = checkpoint.root, checkpoint.root / RELEASE, checkpoint.named
    steps = []
    if (root / BRIDGE_TRACKER).is_file():
        steps.append(removal(root / BRIDGE_TRACKER, "Bridge's tracker of a training"))
    if payload.path != release and os.path.lexists(release):
        steps.append(_out_of_the_way(root, release))
    if payload.path != release:
        if named == payload.path.name:
            steps.append(removal(root / TRACKER, f"it names {named}, which is about to move"))
            named = None
        steps.append(Step(f"rename {payload.path.name} to {RELEASE}", lambda: rename(payload.path, release)))
    if payload.has(TRAIN_STATE):
        shown = f"{RELEASE}/{TRAIN_STATE}"
        steps.append(removal(release / TRAIN_STATE, "a release has no training state", shown=shown))
    if named != RELEASE:
        steps.append(Step(f"write {RELEASE} into the tracker", lambda: replace(root / TRACKER, RELEASE.encode())))
    return steps


def _out_of_the_way(root: Path, release: Path) -> Step:
    if is_empty(release):
        return removal_of_empty(release)
    name = free_name(root, ASIDE)
    why = "it is not whole; it can be removed once all is well"
    return Step(f"rename {RELEASE} to {name} ({why})", lambda: rename(release, root / name))


def _removals(checkpoint: Checkpoint, payload: Payload, index: Path | None) -> list[Step]:
    """Return the steps that remove what is left over."""
    root = checkpoint.root
    left = [root / name for name in checkpoint.leftovers if root / name != payload.path]
    others = [root / name for name in checkpoint.folders if name not in (RELEASE, payload.path.name)]
    # A repair that was killed left these in the payload, which is called release by the time that they are removed.
    partial = [
        path.name
        for path in sorted(payload.path.iterdir())
        if path.name.endswith(INCOMPLETE) and (path.is_file() or path.is_symlink())
    ]
    return [
        *(removal(path, "left by an import that was killed", of_staging=root / RELEASE) for path in left),
        *(removal_of_empty(folder) for folder in others if is_empty(folder, but=index)),
        *(removal(root / RELEASE / name, "left by a repair that was killed") for name in partial),
    ]


def run(plan: Plan, on_step: Callable[[Step], None] = lambda step: None) -> None:
    """Carry out a plan, under the lock that an import takes.

    Args:
        plan: From `plan`.
        on_step: Called before each step.

    Raises:
        Refused: An import or another repair is running, or was after the plan was made.
        OSError: The root can't be written to. Another run does the rest.
    """
    if not plan.steps:
        return
    staging = Staging(plan.root / RELEASE)
    actions.act(staging.open)
    try:
        try:
            refuse_second(staging.folder, staging.target)
        except FileExistsError:
            raise Refused(f"an import or a repair of {plan.root} is running: wait for it") from None
        found = examine(plan.root)
        # The lock is this repair's own.
        found.busy = False
        now = _plan(found, plan.hf_model, plan.trust_remote_code)
        if [step.what for step in now.steps] != [step.what for step in plan.steps]:
            raise Refused(f"{plan.root} has changed since this repair looked at it: run the command again")
        for step in now.steps:
            on_step(step)
            step.do()
    finally:
        # If this fails, the next run does it.
        with suppress(OSError):
            staging.close()
