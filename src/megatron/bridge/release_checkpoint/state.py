# SPDX-License-Identifier: Apache-2.0
"""The common state of a payload, in its two forms, and how two of them compare."""

import errno
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint.layout import COMMON_PT
from megatron.bridge.release_checkpoint.metadata import Metadata, StoredTensor, read_common_state
from megatron.bridge.release_checkpoint.pickles import Inert, RefusedPickle, UnreadablePickle


COMMON_STATE = "common_state/shard_0_1"
"""The entry that core 0.19 writes in place of `common.pt`. If that file exists, core 0.19 reads it instead
(load_common_state_dict in megatron/core/dist_checkpointing/serialization.py)."""
ENTRY = "entry"

FORMS = {COMMON_PT: COMMON_PT, ENTRY: "the entry common_state"}
"""Forms of the common state, in the order in which readers look for them, with the words for them."""

TRAINING_STATE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
"""Keys of a training's state."""

# Characters of all args in print.
_MAX_ARGS = 4 << 20
MAX_INT = (1 << 63) - 1


@dataclass(frozen=True)
class CommonState:
    """One form of the common state.

    Attributes:
        state: Its content, None if it is damaged.
        damage: What is wrong with it, None if nothing is.
    """

    state: dict[str, Any] | None = None
    damage: str | None = None


def read_forms(folder: Path, metadata: Metadata, damage: list[str]) -> dict[str, CommonState]:
    """Read the common state in each form that exists.

    One form may have what the other has lost. But a pickle that names a foreign class, and a file that the system does
    not let the user read, are damage whatever the other form holds: the user has to decide about them.

    Args:
        folder: Payload folder.
        metadata: What its `.metadata` says.
        damage: Takes a line for each kind of damage that the other form does not make up for.
    """
    forms = {}
    file = folder / COMMON_PT
    # All readers take a link that leads nowhere for a missing file.
    if file.exists():
        forms[COMMON_PT] = _read_form(damage, file)
    shard = next((shard for shard in metadata.shards if shard.entry == COMMON_STATE), None)
    if shard is not None:
        forms[ENTRY] = _read_form(damage, folder / shard.file, shard.offset, shard.length)
    if not forms:
        damage.append("there is neither common.pt nor the entry common_state: the checkpoint is not whole")
    elif all(form.damage for form in forms.values()) and not damage:
        damage += [f"{form.damage}. Copy or download the checkpoint again." for form in forms.values()]
    return forms


def _read_form(damage: list[str], file: Path, offset: int = 0, length: int | None = None) -> CommonState:
    if not file.exists():
        # The list of shards names it already.
        return CommonState(damage=f"{file} is missing")
    try:
        if not file.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        state = read_common_state(file, offset, length)
        if length is not None and isinstance(state, list) and len(state) == 1:
            state = state[0]
        if not isinstance(state, dict):
            raise UnreadablePickle(file, f"the common state is a {type(state).__name__}, expected a dict")
        return CommonState(state)
    except RefusedPickle as error:
        damage.append(str(error))
    except UnreadablePickle as error:
        return CommonState(damage=error.finding)
    except OSError as error:
        damage.append(f"{file} can't be read ({error.strerror}). Make it readable first.")
    return CommonState(damage=damage[-1])


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Compare two common states.

    Returns:
        The keys that differ, sorted; a field of the args as `args.FIELD`.
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
    """Return whether two values of pickles are equal. A hostile pickle nests too deep for recursion."""
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
    """Return whether a common state has no classes but argparse.Namespace and torch's, which a release may have."""
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


def plain_args(state: dict[str, Any] | None) -> Namespace | None:
    """Return Megatron-LM's args of a common state, without values that are not plain; None if there are none."""
    args = (state or {}).get("args")
    if not isinstance(args, Inert) or not isinstance(args.state, dict):
        return None
    plain, left = Namespace(), _MAX_ARGS
    known: dict[int, int | None] = {}
    for name, value in args.state.items():
        size = _size_of_plain(value, known)
        if isinstance(name, str) and size is not None and size <= left:
            setattr(plain, name, value)
            left -= size
    return plain


def _size_of_plain(value: Any, known: dict[int, int | None], depth: int = 0) -> int | None:
    """Return about how many characters a value has in print, None if it is not plain.

    Args:
        value: A value of the args.
        known: The result for lists, by their id: a hostile file could have one in a million places.
        depth: Lists around the value.
    """
    if isinstance(value, (list, tuple)):
        # Args have no list in a list in a list.
        if depth > 1 or len(value) > 1000:
            return None
        if id(value) not in known:
            sizes = [_size_of_plain(each, known, depth + 1) for each in value]
            plain = [size for size in sizes if size is not None]
            known[id(value)] = sum(plain, 2) if len(plain) == len(sizes) else None
        return known[id(value)]
    if isinstance(value, str):
        return len(value) + 2
    # JSON has no infinity.
    is_number = isinstance(value, int) and abs(value) <= MAX_INT or isinstance(value, float) and math.isfinite(value)
    return 24 if value is None or is_number else None
