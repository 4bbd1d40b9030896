# SPDX-License-Identifier: Apache-2.0
"""Proves that Megatron-LM computes with a checkpoint what transformers computes with the Hugging Face model."""

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron.bridge.release_checkpoint.args import NEVER_READ, READ
from megatron.bridge.release_checkpoint.doubts import imported_from
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.flags import megatron_lm_flags, unsaid
from megatron.bridge.release_checkpoint.payload import Payload
from megatron.bridge.release_checkpoint.proof import recorded
from megatron.bridge.verify.memory import fits
from megatron.bridge.verify.process import Process
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NOT_PROVED, SAME, Verdict, is_same


TOKENS = 512
CORE = "0.19"
"""The first series of Megatron Core whose wheel has Megatron-LM's arguments and its builder of GPT models."""


def verify(
    out: str | os.PathLike,
    hf_model: str | os.PathLike | None = None,
    *,
    twin: bool | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Prove a checkpoint: compare the logits of Megatron-LM with those of transformers on the same tokens, in float32.

    Megatron-LM's model is built by its own argument code and its own GPT builder, from the args in the checkpoint and
    the flags that the import prints, and loads the weights with its own loader. A model that doesn't fit in memory is
    represented by a twin (`twin.py`), which is imported anew. The checkpoint's args are then compared with those that
    an import of the whole model would write. Both models are computed on the CPU, in processes of their own.

    Args:
        out: A checkpoint root or payload folder: a release, or a training.
        hf_model: The Hugging Face model, a name on the hub or a folder. For a training, its export. Default: the model
            that the release was imported from.
        twin: True compares twins, False the whole models. Default: the whole models if they fit in memory.
        trust_remote_code: Whether code that comes with the Hugging Face model may run.

    Returns:
        The verdict. `Verdict.verdict` says what it means.

    Raises:
        ValueError: There is no checkpoint that Megatron-LM loads, or no Hugging Face model to compare it with.
    """
    found = examine(Path(out))
    payload = found.payload
    if payload is None:
        raise ValueError(f"{out} holds no checkpoint; expected a release or a training: import the model")
    if payload.damage or payload.format != "torch_dist":
        what = payload.damage[0] if payload.damage else f"it has the format {payload.format}, expected torch_dist"
        raise ValueError(f"{out} can't be verified: {what}")
    if payload.args is None or payload.missing_args:
        raise ValueError(
            f"{out} holds no Megatron-LM args: run megatron-bridge repair {out}, or import the model again"
        )
    if hf_model is None and found.layout == "training":
        raise ValueError(f"{out} holds a training; pass its export as the Hugging Face model (--hf-model)")
    if (reason := why_not()) is not None:
        return Verdict(NOT_PROVED, notes=[reason])
    source = str(hf_model or _imported_from(payload))
    if twin is None:
        twin = is_quantized(source) or not fits(payload.parameters or 0)
    if twin:
        return prove_twin(source, trust_remote_code, payload.args)
    adapter = recorded(payload.path).adapter if hf_model is None else None
    return prove(payload, source, trust_remote_code, adapter=adapter)


def why_not() -> str | None:
    """Return why this installation can't prove anything, None if it can."""
    found = metadata.version("megatron-core")
    if Version(found) >= Version(CORE):
        return None
    return f"a proof needs megatron-core {CORE}, whose wheel has Megatron-LM's GPT builder; found {found}"


def prove(
    payload: Payload,
    source: str,
    trust_remote_code: bool,
    of: str = "model",
    process: Process | None = None,
    adapter: str | None = None,
) -> Verdict:
    """Compare a payload, whole, with its Hugging Face model, and the adapter that was merged into it."""
    assert payload.args is not None, "`verify` has looked"
    dtype = payload.dtypes[0] if payload.dtypes and payload.dtypes[0] in ("bfloat16", "float16") else None
    request = {
        "source": source,
        "payload": str(payload.path),
        "flags": megatron_lm_flags(payload.args, use_checkpoint_args=True),
        "length": TOKENS,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "adapter": adapter,
    }
    with process or Process("megatron-lm") as process:
        answer = process.ask(request)
    if is_same(answer.get("figures")):
        return Verdict(SAME, of, answer["figures"], answer["tokens"])
    if answer.get("by") == "transformers":
        return Verdict(NOT_PROVED, of, notes=[f"transformers can't compute the model here: {_short(answer)}"])
    with Process("bridge") as process:
        own = process.ask(request)
    return _conclude(of, answer, own, list(unsaid(payload.args)))


def _conclude(of: str, answer: dict[str, Any], own: dict[str, Any], notes: list[str]) -> Verdict:
    """Judge by what Bridge's own model computes, where Megatron-LM's is none or another."""
    figures, tokens = own.get("figures"), own.get("tokens", 0)
    if notes:
        with_flags = f"no flags of Megatron-LM build this model: {'; '.join(notes)}"
    elif "figures" in answer:
        with_flags = "Megatron-LM, started with the printed flags, computes another model"
    else:
        with_flags = f"Megatron-LM doesn't start with the printed flags: {_short(answer)}"
    if is_same(figures):
        return Verdict(FLAGS, of, figures, tokens, notes or [f"{with_flags}; Bridge's model is right"])
    if figures is not None:
        shown = answer if "figures" in answer else own
        return Verdict(DIFFERS, of, shown["figures"], shown["tokens"], [with_flags, "Bridge's model is another, too"])
    untold = f"Bridge's model can't be computed here: {_short(own)}"
    return Verdict(NOT_PROVED, of, answer.get("figures", {}), answer.get("tokens", 0), [with_flags, untold])


def prove_twin(source: str, trust_remote_code: bool, args: Namespace | None = None) -> Verdict:
    """Make the twin of a model, import it, and compare both.

    Args:
        source: The Hugging Face model, of which only the config is read.
        trust_remote_code: Whether its code may run.
        args: Megatron-LM's args of the whole model's checkpoint, if there is one.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-bridge-twin-") as folder, ExitStack() as stack:
        maker = stack.enter_context(Process("twin"))
        judge = stack.enter_context(Process("megatron-lm"))
        twin, megatron = Path(folder, "hf"), Path(folder, "megatron")
        made = maker.ask(
            {"source": source, "twin": str(twin), "megatron": str(megatron), "trust_remote_code": trust_remote_code}
        )
        if made.get("by") == "config":
            return Verdict(NOT_PROVED, "twin", notes=[made["error"]])
        if "error" in made:
            return Verdict(NOT_PROVED, "twin", notes=[f"a small model of this config can't be made: {_short(made)}"])
        if args is not None and (others := list(_others(args, made["args"]))):
            return Verdict(DIFFERS, "twin", notes=[f"the args of the checkpoint are another model's: {others[0]}"])
        payload = examine(megatron).payload
        assert payload is not None, "it was imported"
        return prove(payload, str(twin), trust_remote_code, "twin", judge)


def _others(args: Namespace, expected: dict[str, Any]) -> Iterator[str]:
    """Give in what args differ from those of an import of today."""
    # A training chooses these.
    own = ("seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout", "bf16", "fp16")
    for arg in (*READ, *NEVER_READ):
        if arg.name in own or not hasattr(args, arg.name) or arg.name not in expected:
            continue
        found = getattr(args, arg.name)
        if found != expected[arg.name]:
            yield f"{arg.name} is {found}, expected {expected[arg.name]}"


def _short(answer: dict[str, Any]) -> str:
    text = str(answer["error"])
    return text if len(text) < 300 else f"{text[:300]} …"


def _imported_from(payload: Payload) -> str:
    source = imported_from(payload.path)
    if source is None:
        raise ValueError(f"{payload.path} doesn't name the Hugging Face model that it came from: pass it (--hf-model)")
    return source


def is_quantized(source: str) -> bool:
    """Return whether a Hugging Face model says that its weights are quantized."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(source, "config.json")).parent
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: pass a folder with a Hugging Face model, or a name on the hub")
    return bool(json.loads((folder / "config.json").read_bytes()).get("quantization_config"))
