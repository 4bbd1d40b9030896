# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, and whether a repair can change that."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.bridge.release_checkpoint.examine import Checkpoint
from megatron.bridge.release_checkpoint.layout import BRIDGE_TRACKER, COMMON_PT, ITERATION_0, RELEASE, TRAIN_STATE
from megatron.bridge.release_checkpoint.payload import Payload, some
from megatron.bridge.release_checkpoint.state import FORMS
from megatron.bridge.release_checkpoint.verdicts import tracker_fault
from megatron.bridge.repair import repair


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, in a line, and whether `megatron-bridge repair` can change it."""

    what: str
    repairable: bool = True


def problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return what is wrong with a checkpoint; nothing if all is well."""
    payload = checkpoint.payload
    if payload is None:
        return [*(Problem(what, repairable=False) for what in _misled(checkpoint)), _absence(checkpoint)]
    plan = repair.foresee(checkpoint)
    steps = plan.steps if plan is not None else ()
    found = list(_faults(checkpoint, payload, plan)) or [f"A repair would {step.what}" for step in steps]
    return [Problem(what, repairable=bool(steps)) for what in found]


def _faults(checkpoint: Checkpoint, payload: Payload, plan: repair.Plan | None) -> Iterator[str]:
    yield from _misled(checkpoint)
    yield from payload.damage
    for name, form in payload.forms.items():
        if form.damage and not payload.damage:
            yield f"{form.damage}; {FORMS[_other(name)]} is whole"
    if payload.discord:
        yield f"common.pt and the entry common_state differ in {some(payload.discord)}; all readers take common.pt"
    if payload.ranks is not None:
        for wrong in payload.contradictions:
            yield f"The args are those of another model: {wrong}"
    yield from _faults_of_root(checkpoint, plan)
    if checkpoint.layout != "training" and not payload.damage and payload.format == "torch_dist":
        yield from _lacks_of_release(checkpoint, payload)


def _faults_of_root(checkpoint: Checkpoint, plan: repair.Plan | None) -> Iterator[str]:
    if fault := tracker_fault(checkpoint):
        yield f"{fault[0].upper()}{fault[1:]}"
    if checkpoint.busy:
        yield "An import or a repair is running here: wait for it"
    else:
        for name in checkpoint.leftovers:
            yield f"{name} was left by an import or a repair that was killed"
    if plan is not None and plan.index is not None:
        yield f"{plan.payload.path.name} is whole but for .metadata, which lies in {plan.index.parent.name}"
    if plan is not None and plan.aside:
        yield f"{RELEASE} is incomplete, {plan.payload.path.name} is complete"


def _lacks_of_release(checkpoint: Checkpoint, payload: Payload) -> Iterator[str]:
    """Say in what a payload without training state differs from a release."""
    is_iteration_0 = checkpoint.layout == "iter"
    if is_iteration_0:
        yield (
            "This is Bridge's layout of iteration 0 (--layout iter). Megatron-LM up to core 0.15 refuses its tracker, "
            "later versions need --finetune. megatron-bridge repair turns it into a release checkpoint"
        )
    elif checkpoint.named == ITERATION_0 and checkpoint.link == RELEASE:
        yield f"The tracker says {checkpoint.tracker} and not {RELEASE}, which the link {ITERATION_0} leads to"
    elif payload.path.name != RELEASE:
        yield f"The weights lie in {payload.path.name} and not in {RELEASE}"
    if payload.args is None:
        yield "The common state has no Megatron-LM args"
    elif payload.missing_args:
        yield f"The args lack {', '.join(payload.missing_args)}"
    for wrong in payload.contradictions:
        yield f"The args are those of another model: {wrong}"
    if payload.version != 3:
        yield f"checkpoint_version is {payload.version}, expected 3.0"
    if "iteration" not in (payload.state or {}):
        yield "The common state has no iteration"
    if not is_iteration_0 and COMMON_PT not in payload.forms:
        yield "There is no common.pt: Megatron-LM up to core 0.18 looks for it"
    if checkpoint.kind == "root" and not is_iteration_0 and (checkpoint.root / BRIDGE_TRACKER).is_file():
        yield f"{BRIDGE_TRACKER} exists: older versions of Bridge prefer it to the tracker"
    if payload.path.name == RELEASE and payload.has(TRAIN_STATE):
        yield f"{RELEASE}/{TRAIN_STATE} exists: a release checkpoint has no state of a training"


def _misled(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.misled is not None:
        yield (
            f"{ITERATION_0} is a link to {checkpoint.misled[:200]}, expected one to {RELEASE}, or none: remove the "
            "link, or put what it leads to in its place"
        )


def _other(form: str) -> str:
    return next(name for name in FORMS if name != form)


def _absence(checkpoint: Checkpoint) -> Problem:
    what = {
        "missing": "there is nothing at this path",
        "file": "this is a file, expected the folder of a checkpoint",
        "empty": "the folder holds no checkpoint",
    }.get(checkpoint.kind, "there is a tracker, or a leftover, but no weights")
    return Problem(f"{what[0].upper()}{what[1:]}: import the model, or pass another path", repairable=False)
