# SPDX-License-Identifier: Apache-2.0
"""Steps that give the common state of a payload what that of a release has, the same in both forms."""

import io
import os
import pickle
from argparse import Namespace
from dataclasses import replace
from typing import Any

from megatron.bridge.release_checkpoint.layout import COMMON_PT, METADATA, RUN_CONFIG
from megatron.bridge.release_checkpoint.metadata import read_metadata_of_torch
from megatron.bridge.release_checkpoint.payload import Payload
from megatron.bridge.release_checkpoint.pickles import Inert
from megatron.bridge.release_checkpoint.state import (
    COMMON_STATE,
    ENTRY,
    FORMS,
    TRAINING_STATE,
    differences,
    is_plain,
)
from megatron.bridge.release_checkpoint.weights import contradictions
from megatron.bridge.repair import steps as steps
from megatron.bridge.repair.steps import NeedsModel, Refused, Step


INTEGRITY = "integrity.json"
# What the common state of a release says, whatever it said before.
_SET = {"checkpoint_version": 3.0, "iteration": 0}


def steps_of_state(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> list[Step]:
    """Return the steps that give the common state what a release's has, the same in both forms.

    `common.pt` comes first, since all readers prefer it. Between the two steps it is right and the entry is old. The
    next repair tells them apart by the same rule as this one (`truth`).
    """
    hashes = f", without {INTEGRITY}, whose hashes go wrong" if payload.has(INTEGRITY) else ""
    stale = [name for name in FORMS if name != payload.source and _differs(payload, name)]
    rewritten = hashes if COMMON_PT in payload.forms else ""
    mended = _state_fault(payload) or _lacking(payload)
    found = []
    if (mended or stale) and not is_plain({**_kept_plain(_state(payload)), "args": None}):
        raise Refused(
            f"{payload.path}: the common state holds objects, expected numbers, text, lists and dicts: import the "
            "model again"
        )
    if mended or stale and not is_plain(_state(payload)):
        source = _source_of_args(payload, hf_model)
        what = f"write Megatron-LM's args, from {source}, into common.pt{rewritten}"
        found.append(Step(what, lambda: _write_state(payload, hf_model, trust_remote_code)))
        stale = [ENTRY] if ENTRY in payload.forms else []
    elif COMMON_PT in stale:
        what = f"write common.pt, which Megatron-LM looks for first, from {FORMS[ENTRY]}{rewritten}"
        found.append(Step(what, lambda: _write_common_pt(payload, _load_state(payload))))
    if ENTRY in stale:
        what = f"write common.pt into {FORMS[ENTRY]}, by a new .metadata{hashes}"
        found.append(Step(what, lambda: _write_entry(payload)))
    return found


def _state(payload: Payload) -> dict[str, Any]:
    """Return the common state. A payload without one is damaged, and not repaired."""
    return payload.state or {}


def _differs(payload: Payload, name: str) -> bool:
    """Return whether one form must be written from the other one. Every release has a `common.pt`."""
    if name not in payload.forms:
        return name == COMMON_PT
    state = payload.forms[name].state
    return state is None or bool(differences(state, _state(payload)))


def _lacking(payload: Payload) -> dict[str, str]:
    """Return the keys that only the other form has, each with the name of that form."""
    others = {name: form.state for name, form in payload.forms.items() if form.state and name != payload.source}
    return {key: name for name, state in others.items() for key in _kept(state) if key not in _state(payload)}


def truth(payload: Payload) -> Payload:
    """Return the payload with the form of the common state that is right.

    Raises:
        Refused: The two forms differ in what a repair doesn't set, and nothing tells which is right.
    """
    found = [replace(payload, source=name) for name, form in payload.forms.items() if form.state is not None]
    ranks = [(not _args_fault(each), each.args is not None) for each in found]
    best = found[ranks.index(max(ranks))]
    kept = [_kept_plain(_state(each)) for each, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    # A key that only one form has is no difference: it is kept.
    shared = [{key: value for key, value in each.items() if key in kept[-1] and key in kept[0]} for each in kept]
    if differing := [name for other in shared[1:] for name in differences(shared[0], other)]:
        what = ", ".join(differing[:3])
        raise Refused(
            f"{payload.path}: common.pt and {FORMS[ENTRY]} differ in {what}, and the weights don't tell which is "
            "right: remove common.pt if it is wrong, or else import the model again"
        )
    return best


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    """Return a common state without the keys that a repair removes or sets."""
    return {key: value for key, value in state.items() if key not in (*TRAINING_STATE, *_SET)}


def _kept_plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return what `_kept` does of a common state that was read by stand-ins, with plain args only."""
    kept = _kept(state)
    if isinstance(args := kept.get("args"), Inert) and isinstance(args.state, dict):
        kept["args"] = Inert()
        kept["args"].state = {key: value for key, value in args.state.items() if is_plain({"": value})}
    return kept


def _args_fault(payload: Payload) -> bool:
    return bool(payload.missing_args or payload.contradictions)


def _state_fault(payload: Payload) -> bool:
    """Return whether the common state differs from a release's in what Megatron-LM reads."""
    state = _state(payload)
    training = any(key in state for key in TRAINING_STATE)
    return _args_fault(payload) or payload.version != 3.0 or state.get("iteration") != 0 or training


def _source_of_args(payload: Payload, hf_model: str | None) -> str:
    if hf_model is not None:
        return str(hf_model)
    if payload.has(RUN_CONFIG):
        return RUN_CONFIG
    wrong = payload.contradictions
    if not payload.missing_args and not wrong:
        return "itself"
    args = f"args that fit its weights ({wrong[0]})" if wrong else "args"
    raise NeedsModel(
        f"{payload.path} has neither {args} nor {RUN_CONFIG} to take them from: pass the model that it was imported "
        "from with --hf-model"
    )


def _write_state(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> None:
    """Write into `common.pt` what that of a release has, as an import does."""
    state = _load_state(payload)
    for key, name in _lacking(payload).items():
        state[key] = _load_state(replace(payload, source=name))[key]
    if _args_fault(payload):
        derived = _derive_args(payload, hf_model, trust_remote_code)
        given = vars(state["args"]) if payload.args is not None else {}
        args = Namespace(**(vars(derived) | {k: v for k, v in given.items() if v is not None}))
        wrong = contradictions(args, payload.metadata)
        state["args"] = Namespace(**(given | vars(derived))) if wrong else args
    # Other values are instances of classes, which `weights_only` does not load everywhere.
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
    steps.replace(payload.path / COMMON_PT, data.getvalue())


def _write_entry(payload: Payload) -> None:
    """Write into the entry what `common.pt` holds."""
    import torch

    data = io.BytesIO()
    torch.save([_load_state(replace(payload, source=COMMON_PT))], data)
    _drop_hashes(payload)
    _replace_entry(payload, data.getvalue())


def _drop_hashes(payload: Payload) -> None:
    """Remove the manifest of hashes, which names files that are about to change."""
    if payload.has(INTEGRITY):
        steps.act((payload.path / INTEGRITY).unlink)
        steps.sync(payload.path)


def _load_state(payload: Payload) -> dict[str, Any]:
    """Load a common state with torch and `weights_only`, which `read_common_state` has read before."""
    from types import SimpleNamespace

    import torch

    source = payload.source or next(name for name, form in payload.forms.items() if form.state is not None)
    name, offset, length = _file_of_state(payload, source)
    with (payload.path / name).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    try:
        from megatron.core.safe_globals import SAFE_GLOBALS

        known = list(SAFE_GLOBALS)
    except ImportError:  # core 0.13 and before
        known = []
    # Permanently, as megatron.core does on import. torch's context manager would remove what that has added.
    torch.serialization.add_safe_globals([Namespace, SimpleNamespace, *known])
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise Refused(f"{payload.path}: the common state can't be read: {str(error).splitlines()[0]}") from None
    return state if source == COMMON_PT else state[0]


def _file_of_state(payload: Payload, source: str) -> tuple[str, int, int]:
    if source == COMMON_PT:
        return COMMON_PT, 0, -1
    assert payload.metadata is not None, "a payload without it is damaged, and not repaired"
    shard = next(shard for shard in payload.metadata.shards if shard.entry == COMMON_STATE)
    return shard.file, shard.offset, shard.length


def _derive_args(payload: Payload, hf_model: str | None, trust_remote_code: bool) -> Any:
    """Return the args that an import of this model writes, from Bridge's model provider."""
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
            "pass the model that was imported with --hf-model"
        )
    return args


def _replace_entry(payload: Payload, data: bytes) -> None:
    """Put the common state into a file of its own, and let `.metadata` point there.

    PyTorch's reader takes file, offset and length from `storage_data` of `.metadata` (FileSystemReader.read_data in
    torch/distributed/checkpoint/filesystem.py, 2.11). The old bytes stay between the weights, and nobody reads them.
    """
    from megatron.bridge.training.common_state import pickled

    path = payload.path / METADATA
    metadata = read_metadata_of_torch(path)
    used = {info.relative_path for info in metadata.storage_data.values()}
    name = next(name for number in range(len(used) + 1) if (name := f"__0_{number}.distcp") not in used)
    steps.replace(payload.path / name, data)
    for index, info in metadata.storage_data.items():
        if index.fqn == COMMON_STATE:
            metadata.storage_data[index] = type(info)(name, 0, len(data))
    steps.replace(path, pickled(metadata))
    for orphan in used - {info.relative_path for info in metadata.storage_data.values()}:
        steps.act(os.unlink, payload.path / orphan)
