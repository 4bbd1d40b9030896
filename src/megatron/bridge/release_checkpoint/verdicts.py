# SPDX-License-Identifier: Apache-2.0
"""Who can load a checkpoint: rules about what `examine` finds.

They are the rules of `megatron/training/checkpointing.py` and of the command line in `megatron/training/arguments.py`
(core_v0.12.3, 0.13.1, 0.14.0, 0.15.3, 0.16.1, 0.17.1, 0.18.2, 0.19.0). A verdict names the function that it is about.
"""

import functools
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from megatron.bridge.release_checkpoint.examine import Checkpoint
from megatron.bridge.release_checkpoint.flags import megatron_lm_flags, unsaid
from megatron.bridge.release_checkpoint.layout import COMMON_PT, ITERATION_0, RELEASE, RUN_CONFIG
from megatron.bridge.release_checkpoint.payload import Payload


Loads = Literal["yes", "partly", "no", "unknown"]
_Found = tuple[Loads, str] | None


@dataclass(frozen=True)
class Series:
    """A series of Megatron-LM, by what it asks of a checkpoint.

    Attributes:
        name: The series of Megatron Core.
        takes_zero: `read_metadata` takes a tracker that says 0. It asserts `iteration > 0` up to core 0.15, and
            `iteration > -1` from core 0.16 on.
        needs_args: `load_checkpoint` reads `state_dict["args"]`, and both parallel sizes in it, unconditionally. It
            does so up to core 0.15.
        needs_common_pt: `load_common` knows only `common.pt`, up to core 0.18. Core 0.19 takes either form
            (`load_common_state_dict` in megatron/core/dist_checkpointing/serialization.py).
        has_fsdp_dtensor: It knows this format, from core 0.14 on.
        untaken: Flags whose fields `load_args_from_checkpoint` doesn't take, but that of core 0.19 does.
        unknown: Flags that `arguments.py` doesn't have, but that of core 0.19 does.
    """

    name: str
    takes_zero: bool = True
    needs_args: bool = False
    needs_common_pt: bool = True
    has_fsdp_dtensor: bool = True
    untaken: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


# Named after the first series that has the flags.
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
# Defaults of megatron/core/transformer/transformer_config.py, which hold if a flag is not given or not known.
_ALIKE = {"--moe-router-score-function": "softmax", "--rope-type": "yarn"}
_CORE = "Megatron-LM, core "
_UP_TO_0_15: dict[str, Any] = {"takes_zero": False, "needs_args": True, "untaken": _UNTAKEN_0_15}

MEGATRON_LM = (
    Series("0.12", **_UP_TO_0_15, has_fsdp_dtensor=False, unknown=_SINCE_0_13),
    Series("0.13", **_UP_TO_0_15, has_fsdp_dtensor=False, unknown=_SINCE_0_14),
    Series("0.14", **_UP_TO_0_15, unknown=_SINCE_0_15),
    Series("0.15", **_UP_TO_0_15, unknown=_SINCE_0_16),
    Series("0.16", untaken=_UNTAKEN_0_16, unknown=_SINCE_0_17),
    Series("0.17", unknown=_SINCE_0_19),
    Series("0.18", unknown=_SINCE_0_19),
    Series("0.19", needs_common_pt=False),
)


# Args that `check_checkpoint_args` reads unconditionally, and those that `load_checkpoint` does.
_COMPARED = ("num_layers", "hidden_size", "num_attention_heads")
_PARALLEL_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


@dataclass(frozen=True)
class Verdict:
    """Whether a reader loads a checkpoint.

    Attributes:
        reader: The reader.
        loads: "partly" means that the command line must say more than the checkpoint can give, or that not all loads.
        why: The reason, in a line.
    """

    reader: str
    loads: Loads
    why: str


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
    if checkpoint.payload is None:
        return "no", "there is no checkpoint"
    judged = (rule(checkpoint, checkpoint.payload, series) for rule in _RULES)
    return next(found for found in judged if found is not None)


def _finds(checkpoint: Checkpoint, payload: Payload, series: Series) -> _Found:
    """Judge the way from the tracker to a payload that can be read."""
    if (fault := tracker_fault(checkpoint)) is not None:
        return "no", fault
    if checkpoint.named == ITERATION_0 and not series.takes_zero:
        return "no", "refuses a tracker that says 0 (read_metadata)"
    if (unread := _unread(payload)) is not None:
        return unread
    if series.needs_common_pt and payload.format == "torch_dist" and COMMON_PT not in payload.forms:
        return "no", "looks for common.pt, which is not here (load_common)"
    return None


def _resumes(checkpoint: Checkpoint, payload: Payload, series: Series) -> _Found:
    """Judge an iteration, which Megatron-LM takes for a training."""
    if checkpoint.named == RELEASE:
        return None
    if not payload.has_optimizer:
        return "no", "KeyError: 'optimizer', unless started with --finetune (load_checkpoint)"
    if not {"iteration", "total_iters"} & (payload.state or {}).keys():
        return "no", "has no iteration: exits, unless started with --finetune (load_checkpoint)"
    return None


def _takes_args(checkpoint: Checkpoint, payload: Payload, series: Series) -> _Found:
    """Judge whether the args are there, and are those of the weights."""
    args, lacks = payload.args, payload.missing_args
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
    if payload.contradictions:
        return "no", payload.contradictions[0]
    if "iteration" not in (payload.state or {}):
        return "partly", "KeyError: 'iteration' with --use-checkpoint-args (load_args_from_checkpoint)"
    if lacks := [name for name in lacks if name not in _PARALLEL_SIZES]:
        return "partly", f"args lack {', '.join(lacks[:3])}: only with the flags for them"
    return None


def _starts(checkpoint: Checkpoint, payload: Payload, series: Series) -> _Found:
    assert payload.args is not None, "`_takes_args` decides without them"
    if checkpoint.named == RELEASE and (found := _command_line(payload.args, series)):
        return found
    if payload.format == "fsdp_dtensor" and not series.has_fsdp_dtensor:
        return "no", "doesn't know the format fsdp_dtensor (_get_checkpoint_format)"
    if payload.as_saved:
        return "partly", f"only split as it was saved: {' '.join(payload.as_saved)}"
    return "yes", "starts at iteration 0" if checkpoint.named == RELEASE else f"resumes at {payload.iteration}"


_RULES: tuple[Callable[[Checkpoint, Payload, Series], _Found], ...] = (_finds, _resumes, _takes_args, _starts)
"""In the order in which Megatron-LM comes to them. The first that has something to say decides."""


def _command_line(args: Namespace, series: Series) -> _Found:
    """Judge the flags that build the model of a release. None if they suffice with `--use-checkpoint-args`."""
    beside = set(megatron_lm_flags(args, use_checkpoint_args=True))
    words = megatron_lm_flags(args)
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        # A flag of models that pretrain_gpt.py doesn't build.
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
    """Judge by `resolve_checkpoint` in layout.py, and `load_model_config` in training/model_load_save.py."""
    payload = checkpoint.payload
    if payload is None:
        return "no", "there is no checkpoint"
    if checkpoint.tracker is not None and checkpoint.kind == "root":
        fault = tracker_fault(checkpoint)
        if fault is not None:
            return "no", fault
    if checkpoint.kind == "root" and payload.path.name not in checkpoint.folders:
        return "no", f"there is only {payload.path.name}"
    if (unread := _unread(payload)) is not None:
        return unread
    if payload.format == "fsdp_dtensor":
        return "no", "doesn't read fsdp_dtensor: load it with Megatron-LM, and save it with --ckpt-format torch_dist"
    core = _installed_core()
    if payload.common == "entry" and core is not None and core < (0, 19):
        return "no", f"megatron-core {core[0]}.{core[1]} is installed, it looks for common.pt"
    beside = payload.path.name != RELEASE and (payload.path.parent / RELEASE / RUN_CONFIG).is_file()
    if not payload.has(RUN_CONFIG) and not beside:
        return "partly", f"has no {RUN_CONFIG}: only with the Hugging Face model, export --hf-model"
    return "yes", "export, and finetune with pretrained_checkpoint" if payload.format == "torch_dist" else "export"


@functools.cache
def _installed_core() -> tuple[int, int] | None:
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("megatron-core"))
    except metadata.PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def tracker_fault(checkpoint: Checkpoint) -> str | None:
    """Return why Megatron-LM doesn't get from the tracker to the payload, None if it does."""
    found = checkpoint.payload.path.name if checkpoint.payload else None
    if checkpoint.tracker is None:
        return "no tracker: starts from random weights"
    if checkpoint.named is None:
        return f"the tracker holds {checkpoint.tracker[:20]!r}"
    if checkpoint.named == ITERATION_0 and checkpoint.link == RELEASE == found:
        return None
    if checkpoint.named not in checkpoint.folders:
        return f"the tracker names {checkpoint.named}, which is not there"
    if found != checkpoint.named:
        return f"the tracker names {checkpoint.named}, not {found}"
    return None


def _unread(payload: Payload) -> _Found:
    if payload.damage:
        return "no", payload.damage[0]
    # All readers take the first form that exists, and don't go on to the other.
    if payload.forms and (damage := next(iter(payload.forms.values())).damage):
        return "no", damage
    return None


def launch_flags(checkpoint: Checkpoint) -> dict[str, Sequence[str]] | None:
    """Return Megatron-LM's command line, with and without `--use-checkpoint-args`.

    Returns:
        None without args, and for a model that no command line gives.
    """
    payload = checkpoint.payload
    if payload is None or payload.args is None or payload.missing_args:
        return None
    load = ["--load", str(checkpoint.root), *payload.as_saved]
    flags: dict[str, Sequence[str]] = {
        "use_checkpoint_args": [*load, *megatron_lm_flags(payload.args, use_checkpoint_args=True)],
        "without": [*load, *megatron_lm_flags(payload.args)],
    }
    return None if unsaid(payload.args) else flags
