# SPDX-License-Identifier: Apache-2.0
"""What an import left out or could not prove, and what a comparison with transformers said, in `run_config.yaml`.

The section is the last of the file, a plain mapping whose values are JSON, which every reader of YAML reads:

    proof:
      left_out: ["3 tensors that the Megatron model has no place for, …"]
      unproved: []
      verdict: null

Bridge's readers of a run config ask for sections by name, and so never see it.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.bridge.release_checkpoint.files import write_new
from megatron.bridge.release_checkpoint.layout import INCOMPLETE, RUN_CONFIG, as_path


_SECTION = re.compile(r"^proof:\n((?:  \w+: .*\n)*)\Z", re.MULTILINE)
_LONGEST = 2000  # characters of a line, and lines


@dataclass
class Proof:
    """What is known of a checkpoint beside its weights.

    Attributes:
        left_out: What of the Hugging Face model the checkpoint doesn't have, a line each.
        unproved: What nobody has compared, a line each.
        verdict: What a comparison of the logits said, plain values by name. None if there was none.
        adapter: The folder of the adapter that was merged into the model, None if none was.
    """

    left_out: list[str] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    adapter: str | None = None


@dataclass
class _Import:
    """An import that runs: what is recorded of it, its warnings, and what accounts for its weights."""

    strict: bool
    proof: Proof = field(default_factory=Proof)
    warnings: set[str] = field(default_factory=set)
    account: Any = None


_running: ContextVar[_Import | None] = ContextVar("running", default=None)


def of_import(import_ckpt: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an import, so that `noted` returns its proof, and `is_strict` its keyword `strict`, while it runs."""

    @functools.wraps(import_ckpt)
    def run(*args: Any, **kwargs: Any) -> Any:
        token = _running.set(_Import(kwargs.get("strict", True)))
        try:
            return import_ckpt(*args, **kwargs)
        finally:
            _running.reset(token)

    return run


def noted() -> Proof | None:
    """Return the proof of the import that runs, to be added to, or None if none runs."""
    running = _running.get()
    return running.proof if running else None


def is_strict() -> bool | None:
    """Return whether the import that runs refuses what it would leave out, or None if none runs."""
    running = _running.get()
    return running.strict if running else None


def remember_account(account: Any) -> None:
    """Keep what accounts for the weights of the import that runs. Does nothing if none runs."""
    if (running := _running.get()) is not None:
        running.account = account


def account_of_import() -> Any:
    """Return what accounts for the weights of the import that runs, or None."""
    running = _running.get()
    return running and running.account


def warn(logger: logging.Logger, warning: str, *, left_out: str | None = None, unproved: str | None = None) -> None:
    """Warn of something, once in an import, which may come to it twice if it can't stream.

    Args:
        logger: Who warns.
        warning: The warning.
        left_out: What the run config shall say is left out, without the name of the model.
        unproved: What it shall say nobody has compared.
    """
    if (running := _running.get()) is not None:
        if warning in running.warnings:
            return
        running.warnings.add(warning)
        running.proof.left_out += [left_out] if left_out else []
        running.proof.unproved += [unproved] if unproved else []
    logger.warning(warning, stacklevel=2)


def record_import(payload: str | os.PathLike) -> None:
    """Write the proof of the import that runs into a payload's `run_config.yaml`. Does nothing if none runs.

    An empty one is written, too: it shows that the import accounted for what it read.
    """
    if (proof := noted()) is not None:
        record(payload, **asdict(proof))


def record(payload: str | os.PathLike, **changes: Any) -> None:
    """Change the proof in a payload's `run_config.yaml`, in one step.

    Args:
        payload: The payload folder, a path or a MultiStorageClient URL. It has a `run_config.yaml`.
        **changes: New values of fields of `Proof`. The others stay.

    Raises:
        OSError: The file can't be read or written.
        TypeError: A value is not plain, or there is no such field.
    """
    path = as_path(payload) / RUN_CONFIG
    # "${" would be an interpolation to OmegaConf.
    values = asdict(Proof(**asdict(recorded(payload)) | changes))
    section = "".join(f"  {name}: {json.dumps(value).replace('${', '$ {')}\n" for name, value in values.items())
    text = f"{_SECTION.sub('', path.read_text(encoding='utf-8')).rstrip()}\nproof:\n{section}"
    if str(path).startswith("msc://"):
        path.write_text(text, encoding="utf-8")
        return
    new = path.with_name(RUN_CONFIG + INCOMPLETE)
    write_new(new, text.encode())
    new.replace(path)


def is_recorded(payload: str | os.PathLike) -> bool:
    """Return whether a payload's `run_config.yaml` has a proof."""
    try:
        text = (as_path(payload) / RUN_CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return _SECTION.search(text) is not None


def recorded(payload: str | os.PathLike) -> Proof:
    """Return the proof in a payload's `run_config.yaml`. It is empty if there is none, or none that makes sense."""
    path = as_path(payload) / RUN_CONFIG
    try:
        found = _SECTION.search(path.read_text(encoding="utf-8"))
        lines = found[1].splitlines() if found else []
        values = {name.strip(): json.loads(value) for name, _, value in (line.partition(":") for line in lines)}
    except (OSError, ValueError, RecursionError):
        return Proof()
    verdict, adapter = values.get("verdict"), values.get("adapter")
    return Proof(
        left_out=_lines(values.get("left_out")),
        unproved=_lines(values.get("unproved")),
        verdict=verdict if isinstance(verdict, dict) else None,
        adapter=adapter[:_LONGEST] if isinstance(adapter, str) else None,
    )


def _lines(value: Any) -> list[str]:
    lines = value if isinstance(value, list) else []
    return [line[:_LONGEST] for line in lines[:_LONGEST] if isinstance(line, str)]
