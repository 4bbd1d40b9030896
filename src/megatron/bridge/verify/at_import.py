# SPDX-License-Identifier: Apache-2.0
"""The proof of an import: a twin beside the conversion, and a verdict before the release is published."""

import functools
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.release_checkpoint import proof as records
from megatron.bridge.release_checkpoint.payload import examine_payload
from megatron.bridge.verify.memory import fits
from megatron.bridge.verify.process import IN_PROOF, Process
from megatron.bridge.verify.proof import is_quantized, prove, prove_twin, why_not
from megatron.bridge.verify.proved import unproved
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NOT_PROVED, Verdict


logger = logging.getLogger(__name__)


@dataclass
class _Import:
    """What an import that runs is to prove."""

    source: str = ""
    trust_remote_code: bool = False
    strict: bool = True
    known: tuple[str, ...] = ()
    twin: Process | None = None
    wanted: bool = False


_running: ContextVar[_Import | None] = ContextVar("running", default=None)


def ends_with(import_ckpt: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an import, so that the process of its proof ends with it, however it ends."""

    @functools.wraps(import_ckpt)
    def run(*args: Any, **kwargs: Any) -> Any:
        running = _Import()
        token = _running.set(running)
        try:
            return import_ckpt(*args, **kwargs)
        finally:
            _running.reset(token)
            if running.twin is not None:
                running.twin.end()

    return run


def start(bridge: Any, source: str | os.PathLike, verify: bool | None, strict: bool, **options: Any) -> None:
    """Start the proof of the import that runs, on rank 0.

    Args:
        bridge: An `AutoBridge` of the model.
        source: The Hugging Face model.
        verify: True proves the model, whole if it fits in memory, False proves nothing. None runs a twin beside the
            conversion if no comparison has covered a config like this.
        strict: Whether a model that differs is refused.
        **options: What `import_ckpt` passes to `from_hf_pretrained`.
    """
    from megatron.bridge.models.conversion.config_check import remarks
    from megatron.bridge.models.conversion.layout_families import needs_layout
    from megatron.bridge.models.conversion.rope_scaling import own_config
    from megatron.bridge.utils.common_utils import get_rank_safe

    running = _running.get()
    if running is None or verify is False or get_rank_safe() != 0 or IN_PROOF in os.environ:
        return
    config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    news = unproved(config)
    if not news and not verify:
        return
    if (reason := why_not()) is not None:
        if verify:
            _tell(Verdict(NOT_PROVED, notes=[reason]), running)
        return
    if needs_layout(config.to_dict()):
        _tell(Verdict(NOT_PROVED, notes=["its layers need Transformer Engine, and a proof runs without it"]), running)
        return
    # A name on the hub says nothing of the revision.
    source = bridge.hf_pretrained.state.source.path if options.get("revision") else source
    running.source, running.strict, running.wanted = str(source), strict, bool(verify)
    running.trust_remote_code = bool(options.get("trust_remote_code"))
    running.known = tuple(remarks(own_config(config)))
    if not verify:
        logger.info("No comparison has covered %s: a small twin of the model is compared meanwhile", ", ".join(news))
        running.twin = Process("prove", "megatron.bridge.verify.beside")
        running.twin.send({"source": running.source, "trust_remote_code": running.trust_remote_code})


def conclude(payload: str) -> None:
    """Wait for the proof of the import that runs, and record it. The payload is complete and not yet published.

    Raises:
        ValueError: Megatron Core computes another model than transformers.
    """
    running = _running.get()
    if running is None or not running.source:
        return
    if running.twin is not None:
        answer = running.twin.answer()
        found = answer.get("verdict") or {"verdict": NOT_PROVED, "of": "twin", "notes": [answer.get("error", "")]}
        _tell(Verdict(**found), running)
        return
    staged = examine_payload(Path(payload))
    trust = running.trust_remote_code
    if is_quantized(running.source) or not fits(staged.parameters or 0):
        _tell(prove_twin(running.source, trust, staged.args), running)
    else:
        proof = records.noted()
        _tell(prove(staged, running.source, trust, adapter=proof.adapter if proof else None), running)


def _tell(verdict: Verdict, running: _Import) -> None:
    """Record a verdict, warn of all but the best, and refuse the worst."""
    if (proof := records.noted()) is not None:
        proof.verdict = verdict.plain()
    if verdict.verdict == DIFFERS and running.strict and not running.known:
        raise ValueError(
            f"{running.source}: Megatron Core would compute another model than transformers ({verdict.line}): use a "
            "model whose config is supported, or pass strict=False (--no-strict)"
        )
    if verdict.verdict in (FLAGS, DIFFERS, NOT_PROVED):
        logger.warning("Proof of %s: %s", running.source or "the import", verdict.line)
