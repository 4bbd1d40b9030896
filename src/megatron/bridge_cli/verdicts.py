# SPDX-License-Identifier: Apache-2.0
"""Who can load a checkpoint, and what is wrong with it: rules over what `checkpoint.examine` found.

The rules are those of `megatron/training/checkpointing.py` and of the command line in `megatron/training/arguments.py`
(core_v0.12.3, 0.13.1, 0.14.0, 0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0); a rule names its function.
"""

import functools
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from megatron.bridge.release_checkpoint.flags import megatron_lm_flags
from megatron.bridge_cli import repair
from megatron.bridge_cli.checkpoint import (
    BRIDGE_TRACKER,
    COMMON_PT,
    FORMS,
    ITERATION_0,
    RELEASE,
    RUN_CONFIG,
    TRAIN_STATE,
    Checkpoint,
    Payload,
    contradictions,
)


Loads = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Series:
    """A series of Megatron-LM, by what it asks of a checkpoint.

    Attributes:
        name: Of Megatron Core.
        takes_zero: `read_metadata` takes a tracker that says 0: it asserts `iteration > 0` up to core 0.15, and
            `iteration > -1` from core 0.16 on.
        needs_args: `load_checkpoint` reads `state_dict["args"]`, and both parallel sizes of it, without asking whether
            they are there, up to core 0.15.
        needs_common_pt: `load_common` knows only `common.pt`, up to core 0.18. Core 0.19 takes either
            (`load_common_state_dict` in megatron/core/dist_checkpointing/serialization.py).
        untaken: Flags whose fields `load_args_from_checkpoint` doesn't take, while that of core 0.19 does.
        unknown: Flags that `arguments.py` doesn't have, while that of core 0.19 does.
    """

    name: str
    takes_zero: bool = True
    needs_args: bool = False
    needs_common_pt: bool = True
    untaken: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


# By the series from which on a flag is known.
_SINCE_0_19 = (
    "--yarn-original-max-position-embeddings",
    "--yarn-beta-fast",
    "--yarn-beta-slow",
    "--yarn-correction-range-round-to-int",
    "--no-yarn-correction-range-round-to-int",
)
# Before, there was --hybrid-override-pattern.
_SINCE_0_17 = (*_SINCE_0_19, "--hybrid-layer-pattern")
_SINCE_0_16 = (*_SINCE_0_17, "--moe-latent-size", "--moe-shared-expert-gate")
_SINCE_0_15 = (*_SINCE_0_16, "--window-size", "--window-attn-skip-freq", "--softmax-type", "--quick-geglu")
_SINCE_0_14 = (*_SINCE_0_15, "--rope-type")
_SINCE_0_13 = (*_SINCE_0_14, "--qk-l2-norm", "--no-rope-freq")
_UNTAKEN_0_16 = ("--mtp-num-layers", "--hybrid-layer-pattern")
_UNTAKEN_0_15 = (
    *_UNTAKEN_0_16,
    "--moe-router-score-function",
    "--moe-router-enable-expert-bias",
    "--moe-router-topk-scaling-factor",
    "--moe-latent-size",
)
# What is done where a flag is not given, or not known: megatron/core/transformer/transformer_config.py.
_ALIKE = {"--moe-router-score-function": "softmax", "--rope-type": "yarn"}
_CORE = "Megatron-LM, core "
_UP_TO_0_15 = {"takes_zero": False, "needs_args": True, "untaken": _UNTAKEN_0_15}

MEGATRON_LM = (
    Series("0.12", **_UP_TO_0_15, unknown=_SINCE_0_13),
    Series("0.13", **_UP_TO_0_15, unknown=_SINCE_0_14),
    Series("0.14", **_UP_TO_0_15, unknown=_SINCE_0_15),
    Series("0.15", **_UP_TO_0_15, unknown=_SINCE_0_16),
    Series("0.16", untaken=_UNTAKEN_0_16, unknown=_SINCE_0_17),
    Series("0.17", unknown=_SINCE_0_19),
    Series("0.18", unknown=_SINCE_0_19),
    Series("0.19", needs_common_pt=False),
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
    judged = [Verdict(f"{_CORE}{series.name}", *_megatron_lm(checkpoint, series)) for series in MEGATRON_LM]
    return [*judged, Verdict("Megatron-Bridge", *_bridge(checkpoint))]


def grouped(judged: Sequence[Verdict]) -> list[Verdict]:
    """Make one line of series of Megatron-LM that follow each other and are judged alike."""
    found: list[tuple[list[str], Verdict]] = []
    for each in judged:
        if (
            found
            and each.reader.startswith(_CORE)
            and (found[-1][1].loads, found[-1][1].why) == (each.loads, each.why)
        ):
            found[-1][0].append(each.reader.removeprefix(_CORE))
        else:
            found.append(([], each))
    return [
        Verdict(f"{each.reader} to {more[-1]}" if more else each.reader, each.loads, each.why) for more, each in found
    ]


def _megatron_lm(checkpoint: Checkpoint, series: Series) -> tuple[Loads, str]:
    payload = checkpoint.payload
    if payload is None:
        return "no", "there is no checkpoint"
    if (tracker := _tracker_fault(checkpoint)) is not None:
        return "no", tracker
    if checkpoint.named == ITERATION_0 and not series.takes_zero:
        return "no", "refuses a tracker that says 0 (read_metadata)"
    if (unread := _unread(payload)) is not None:
        return unread
    if series.needs_common_pt and COMMON_PT not in payload.forms:
        return "no", "looks for common.pt, which is not here (load_common)"
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
    if checkpoint.named != RELEASE:
        return "yes", f"resumes at {payload.iteration}"
    return _command_line(args, series) or ("yes", "starts at iteration 0")


def _command_line(args: Namespace, series: Series) -> tuple[Loads, str] | None:
    """Judge by the flags that build the model of a release; None where `--use-checkpoint-args` and they will do."""
    beside = set(megatron_lm_flags(args, use_checkpoint_args=True))
    words = megatron_lm_flags(args)
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        # Of models that pretrain_gpt.py doesn't build.
        words += ["--hybrid-layer-pattern", str(pattern)]
    unknown, untaken = [], []
    for flag, word in zip(words, [*words[1:], ""], strict=True):
        value = "" if word.startswith("--") else word
        if not flag.startswith("--") or _ALIKE.get(flag, "--") == value:
            continue
        if flag in series.unknown and (flag in beside or flag in series.untaken):
            unknown.append(flag)
        elif flag in series.untaken:
            untaken.append(f"{flag} {value}".strip())
    if unknown:
        return "no", f"has no {', '.join(unknown)}, which this model needs (arguments.py)"
    if untaken:
        return "partly", f"takes not all from the args (load_args_from_checkpoint): give {' '.join(untaken)} as well"
    return None


def _bridge(checkpoint: Checkpoint) -> tuple[Loads, str]:
    """Judge by `resolve_checkpoint` in megatron/bridge/release_checkpoint/layout.py, and `load_model_config`."""
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
    if checkpoint.named == ITERATION_0 and checkpoint.link == RELEASE == checkpoint.payload.path.name:
        return None
    if checkpoint.named not in checkpoint.folders:
        return f"the tracker names {checkpoint.named}, which is not there"
    if checkpoint.payload.path.name != checkpoint.named:
        return f"the tracker names {checkpoint.named}, not {checkpoint.payload.path.name}"
    return None


def _unread(payload: Payload) -> tuple[Loads, str] | None:
    if payload.damage:
        return "no", payload.damage[0]
    # All take the first form that is there, and none goes on to the other.
    if payload.forms and (damage := next(iter(payload.forms.values())).damage):
        return "no", damage
    if payload.format != "torch_dist":
        return "unknown", f"the format {payload.format} is not examined here"
    return None


def problems(checkpoint: Checkpoint) -> list[Problem]:
    """Say what is wrong with a checkpoint; nothing where all is well."""
    if checkpoint.payload is None:
        return [*(Problem(what, repairable=False) for what in _misled(checkpoint)), _absence(checkpoint)]
    plan = repair.foresee(checkpoint)
    steps = plan.steps if plan is not None else ()
    found = list(_faults(checkpoint, plan)) or [f"A repair would {step.what}" for step in steps]
    return [Problem(what, repairable=bool(steps)) for what in found]


def _faults(checkpoint: Checkpoint, plan: repair.Plan | None) -> Iterator[str]:
    payload = checkpoint.payload
    training = checkpoint.layout == "training"
    yield from _misled(checkpoint)
    yield from payload.damage
    for name, form in payload.forms.items():
        if form.damage and not payload.damage:
            yield f"{form.damage}; {FORMS[_other(name)]} is whole"
    if payload.discord:
        yield f"common.pt and the entry common_state differ in {_some(payload.discord)}; all readers take common.pt"
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
    is_iteration_0 = checkpoint.layout == "iter"
    if is_iteration_0:
        yield (
            "This is Bridge's layout of iteration 0 (--layout iter): Megatron-LM up to core 0.15 refuses its tracker, "
            "later ones can't fine-tune from it without --finetune; megatron-bridge repair turns it into a release"
        )
    elif checkpoint.named == ITERATION_0 and checkpoint.link == RELEASE:
        yield f"The tracker says {checkpoint.tracker} and not {RELEASE}, which the link {ITERATION_0} leads to"
    elif payload.path.name != RELEASE:
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
    if not is_iteration_0 and COMMON_PT not in payload.forms:
        yield "There is no common.pt: Megatron-LM up to core 0.18 looks for it"
    if checkpoint.kind == "root" and not is_iteration_0 and (checkpoint.root / BRIDGE_TRACKER).is_file():
        yield f"{BRIDGE_TRACKER} is here: Bridge before release checkpoints believes it and not the tracker"
    if payload.path.name == RELEASE and payload.has(TRAIN_STATE):
        yield f"{RELEASE}/{TRAIN_STATE} speaks of a training, a release has none"


def _misled(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.misled is not None:
        yield (
            f"{ITERATION_0} is a link to {checkpoint.misled[:200]}, expected one to {RELEASE}, or none: remove the "
            "link, or put what it leads to in its place"
        )


def _other(form: str) -> str:
    return next(name for name in FORMS if name != form)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


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
