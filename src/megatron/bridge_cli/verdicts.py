# SPDX-License-Identifier: Apache-2.0
"""Who can load a checkpoint, and what is wrong with it: rules over what `checkpoint.examine` found.

The rules are those of `megatron/training/checkpointing.py` (core_v0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0); a rule
names its function.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from megatron.bridge_cli import repair
from megatron.bridge_cli.checkpoint import (
    BRIDGE_TRACKER,
    RELEASE,
    RUN_CONFIG,
    TRAIN_STATE,
    Checkpoint,
    Payload,
    contradictions,
)
from megatron.bridge_cli.launch_flags import megatron_lm_flags


Loads = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Series:
    """Releases of Megatron-LM that load checkpoints alike.

    Attributes:
        name: What people call it.
        takes_zero: `read_metadata` takes a tracker that says 0: it asserts `iteration > 0` up to core 0.15, and
            `iteration > -1` from core 0.16 on.
        needs_args: `load_checkpoint` reads `state_dict["args"]`, and both parallel sizes of it, without asking whether
            they are there, up to core 0.15.
        needs_common_pt: `load_common` knows only `common.pt`, up to core 0.18. Core 0.19 takes either
            (`load_common_state_dict` in megatron/core/dist_checkpointing/serialization.py).
    """

    name: str
    takes_zero: bool
    needs_args: bool
    needs_common_pt: bool


MEGATRON_LM = (
    Series("Megatron-LM, core 0.15 and before", takes_zero=False, needs_args=True, needs_common_pt=True),
    Series("Megatron-LM, core 0.16 to 0.18", takes_zero=True, needs_args=False, needs_common_pt=True),
    Series("Megatron-LM, core 0.19", takes_zero=True, needs_args=False, needs_common_pt=False),
)


# Args that `check_checkpoint_args` reads without asking whether they are there, and those that `load_checkpoint` does.
_COMPARED = ("num_layers", "hidden_size", "num_attention_heads")
_PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


@dataclass(frozen=True)
class Verdict:
    """Whether a reader loads a checkpoint.

    Attributes:
        reader: The reader.
        loads: "partly" is with more on the command line than the checkpoint itself can give, or less than all of it.
        why: The reason, in a line.
    """

    reader: str
    loads: Loads
    why: str


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, in a line, and whether `megatron-bridge repair` mends it."""

    what: str
    repairable: bool = True


def verdicts(checkpoint: Checkpoint) -> list[Verdict]:
    """Judge a checkpoint for each series of Megatron-LM and for Bridge."""
    judged = [Verdict(series.name, *_megatron_lm(checkpoint, series)) for series in MEGATRON_LM]
    return [*judged, Verdict("Megatron-Bridge", *_bridge(checkpoint))]


def _megatron_lm(checkpoint: Checkpoint, series: Series) -> tuple[Loads, str]:
    payload = checkpoint.payload
    if payload is None:
        return "no", "there is no checkpoint"
    if (tracker := _tracker_fault(checkpoint)) is not None:
        return "no", tracker
    if checkpoint.named == "iter_0000000" and not series.takes_zero:
        return "no", "refuses a tracker that says 0 (read_metadata)"
    if (unread := _unread(payload)) is not None:
        return unread
    if series.needs_common_pt and payload.common != "common.pt":
        return "no", "looks for common.pt, core 0.19 writes none (load_common)"
    state, args, lacks = payload.state or {}, payload.args, payload.missing_args
    if checkpoint.named != RELEASE and not payload.has_optimizer:
        return "no", "KeyError: 'optimizer', unless started with --finetune (load_checkpoint)"
    if checkpoint.named != RELEASE and not {"iteration", "total_iters"} & state.keys():
        return "no", "has no iteration: exits, unless started with --finetune (load_checkpoint)"
    if args is None:
        if series.needs_args:
            return "no", "KeyError: 'args' (load_checkpoint)"
        return "partly", "has no args: only with every flag of the model, and the right padding of the vocabulary"
    if series.needs_args and (sizes := [name for name in lacks if name in _PARALLEL_SIZES]):
        return "no", f"AttributeError: args lack {sizes[0]} (load_checkpoint)"
    if compared := [name for name in lacks if name in _COMPARED]:
        return "no", f"args lack {compared[0]}: stops, unless started with --finetune (check_checkpoint_args)"
    if (payload.version or 0) < 3 and not hasattr(args, "model_parallel_size"):
        return "no", (
            f"checkpoint_version {payload.version or 0}: asks the args for model_parallel_size, "
            "unless started with --finetune (check_checkpoint_args)"
        )
    if wrong := contradictions(args, payload.metadata):
        return "no", wrong[0]
    if "iteration" not in state:
        return "partly", "KeyError: 'iteration' with --use-checkpoint-args (load_args_from_checkpoint)"
    if lacks := [name for name in lacks if name not in _PARALLEL_SIZES]:
        return "partly", f"args lack {', '.join(lacks[:3])}: only with the flags for them"
    return "yes", "starts at iteration 0" if checkpoint.named == RELEASE else f"resumes at {payload.iteration}"


def _bridge(checkpoint: Checkpoint) -> tuple[Loads, str]:
    """Judge by `resolve_checkpoint` in megatron/bridge/training/release_checkpoint.py, and `load_model_config`."""
    payload = checkpoint.payload
    if payload is None:
        return "no", "there is no checkpoint"
    if checkpoint.tracker is not None and checkpoint.kind == "root":
        fault = _tracker_fault(checkpoint)
        if fault is not None:
            return "no", fault
    if checkpoint.kind == "root" and payload.path.name not in checkpoint.folders:
        return "no", f"there is only {payload.path.name}"
    if (unread := _unread(payload)) is not None:
        return unread
    core = _installed_core()
    if payload.common == "entry" and core is not None and core < (0, 19):
        return "no", f"megatron-core {core[0]}.{core[1]} is installed, it looks for common.pt"
    beside = payload.path.name != RELEASE and (payload.path.parent / RELEASE / RUN_CONFIG).is_file()
    if not payload.has(RUN_CONFIG) and not beside:
        return "partly", f"has no {RUN_CONFIG}: only with the Hugging Face model, export --hf-model"
    return "yes", "export, and finetune with pretrained_checkpoint"


@functools.cache
def _installed_core() -> tuple[int, int] | None:
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("megatron-core"))
    except metadata.PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def _tracker_fault(checkpoint: Checkpoint) -> str | None:
    """Say why Megatron-LM doesn't get from the tracker to the payload, None if it does."""
    if checkpoint.tracker is None:
        return "no tracker: starts from random weights"
    if checkpoint.named is None:
        return f"the tracker holds {checkpoint.tracker[:20]!r}"
    if checkpoint.named not in checkpoint.folders:
        return f"the tracker names {checkpoint.named}, which is not there"
    if checkpoint.payload.path.name != checkpoint.named:
        return f"the tracker names {checkpoint.named}, not {checkpoint.payload.path.name}"
    return None


def _unread(payload: Payload) -> tuple[Loads, str] | None:
    if payload.damage:
        return "no", payload.damage[0]
    if payload.format != "torch_dist":
        return "unknown", f"the format {payload.format} is not examined here"
    return None


def problems(checkpoint: Checkpoint) -> list[Problem]:
    """Say what is wrong with a checkpoint; nothing where all is well."""
    if checkpoint.payload is None:
        return [_absence(checkpoint)]
    plan = repair.foresee(checkpoint)
    steps = plan.steps if plan is not None else ()
    found = list(_faults(checkpoint, plan)) or [f"A repair would {step.what}" for step in steps]
    return [Problem(what, repairable=bool(steps)) for what in found]


def _faults(checkpoint: Checkpoint, plan: repair.Plan | None) -> Iterator[str]:
    payload = checkpoint.payload
    training = checkpoint.iteration > 0 or payload.has_optimizer
    yield from payload.damage
    if payload.format == "torch":
        yield "The legacy format torch is not examined here"
        return
    if fault := _tracker_fault(checkpoint):
        yield f"{fault[0].upper()}{fault[1:]}"
    if checkpoint.busy:
        yield "An import or a repair is running here: wait for it"
    else:
        for name in checkpoint.leftovers:
            yield f"{name} was left by an import or a repair that was killed"
    if plan is not None and plan.index is not None:
        yield f"{plan.payload.path.name} is whole but for .metadata, which lies in {plan.index.parent.name}"
    if plan is not None and plan.aside:
        yield f"{RELEASE} is here and is not whole, {plan.payload.path.name} is"
    if training or payload.damage or payload.format != "torch_dist":
        return
    if payload.path.name != RELEASE:
        yield f"The weights lie in {payload.path.name} and not in {RELEASE}"
    if payload.args is None:
        yield "The common state has no Megatron-LM args"
    elif payload.missing_args:
        yield f"The args lack {', '.join(payload.missing_args)}"
    for wrong in contradictions(payload.args, payload.metadata):
        yield f"The args are those of another model: {wrong}"
    if payload.version != 3:
        yield f"checkpoint_version is {payload.version}, expected 3.0"
    if "iteration" not in (payload.state or {}):
        yield "The common state has no iteration"
    if checkpoint.kind == "root" and (checkpoint.root / BRIDGE_TRACKER).is_file():
        yield f"{BRIDGE_TRACKER} is here: Bridge before release checkpoints believes it and not the tracker"
    if payload.path.name == RELEASE and payload.has(TRAIN_STATE):
        yield f"{RELEASE}/{TRAIN_STATE} speaks of a training, a release has none"


def _absence(checkpoint: Checkpoint) -> Problem:
    what = {
        "missing": "there is nothing at this path",
        "file": "this is a file, a checkpoint is a folder",
        "empty": "the folder holds no checkpoint",
    }.get(checkpoint.kind, "the tracker and leftovers are here, the weights are not")
    return Problem(f"{what[0].upper()}{what[1:]}: import the model, or give another path", repairable=False)


def launch_flags(checkpoint: Checkpoint) -> dict[str, Sequence[str]] | None:
    """Return the words of Megatron-LM's command line, with and without `--use-checkpoint-args`; None without args."""
    payload = checkpoint.payload
    if payload is None or payload.args is None or payload.missing_args:
        return None
    load = ["--load", str(checkpoint.root)]
    return {
        "use_checkpoint_args": [*load, *megatron_lm_flags(payload.args, use_checkpoint_args=True)],
        "without": [*load, *megatron_lm_flags(payload.args)],
    }
