# SPDX-License-Identifier: Apache-2.0
"""The subcommand `verify`. It imports no torch itself: the models are computed in processes of their own."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from megatron.bridge.cli.command import CHECKPOINT, JSON, TRUST, Command
from megatron.bridge.cli.text import printable
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.layout import RUN_CONFIG
from megatron.bridge.release_checkpoint.proof import record
from megatron.bridge.verify.proof import verify
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NEAR, NOT_PROVED, SAME, Verdict


EXIT_CODES = {SAME: 0, FLAGS: 0, DIFFERS: 1, NOT_PROVED: 3}
_MEANING = {
    SAME: "Megatron-LM, started with the printed flags, computes what transformers computes.",
    FLAGS: "Bridge's model computes what transformers computes, but no flags of Megatron-LM build that model.",
    DIFFERS: "Megatron-LM does not compute what transformers computes. Don't train from this checkpoint.",
    NOT_PROVED: "The logits could not be compared on this host.",
}


@click.command("verify", cls=Command)
@CHECKPOINT
@click.option(
    "--hf-model",
    metavar="MODEL",
    help="Compare with this Hugging Face model, a folder or a name on the hub. For a trained checkpoint, pass its "
    "export. Default: the model that the checkpoint was imported from.",
)
@click.option(
    "--twin/--whole",
    default=None,
    help="Compare a small twin, which has the same config, or the whole model. Default: the whole model if it fits in "
    "memory.",
)
@TRUST
@JSON
def command(out: Path, hf_model: str | None, twin: bool | None, trust_remote_code: bool, as_json: bool) -> None:
    """Compare Megatron-LM's logits with those of transformers.

    Megatron-LM loads the checkpoint at OUT. Both models read the same 512 tokens, in float32 on the CPU. The exit
    code is 1 if the logits differ, and 3 if they can't be compared on this host. The run_config.yaml of a release
    checkpoint records the result, and `inspect` shows it.
    """
    verdict = verify(out, hf_model, twin=twin, trust_remote_code=trust_remote_code)
    _record(out, verdict)
    if as_json:
        click.echo(json.dumps(verdict.plain(), indent=2))
    else:
        for line in lines(verdict):
            click.echo(printable(line))
    sys.exit(EXIT_CODES[verdict.verdict])


def _record(out: Path, verdict: Verdict) -> None:
    """Record the verdict in a release checkpoint, for `inspect`. One that isn't writable stays as it is."""
    found = examine(out)
    if found.layout == "release" and found.payload is not None and found.payload.has(RUN_CONFIG) and verdict.figures:
        with contextlib.suppress(OSError):
            record(found.payload.path, verdict=verdict.plain())


def lines(verdict: Verdict) -> Iterator[str]:
    """Give the lines of a verdict for people."""
    yield f"{verdict.verdict}: {_MEANING[verdict.verdict]}"
    if figures := verdict.figures:
        of = "the whole model" if verdict.of == "model" else "a twin: the same config, few layers, random weights"
        yield f"  compared            {of}, {verdict.tokens} tokens"
        part = figures["largest_difference"] / figures["largest_logit"]
        largest = figures["largest_logit"]
        yield f"  largest difference  {part:.1e} of the largest logit, {largest:.3g} (same: up to {NEAR:.0e})"
        yield f"  KL divergence       {figures['kl_divergence']:.1e} nats a token"
        yield f"  loss, transformers  {figures['loss_transformers']:.6f}"
        yield f"  loss, Megatron      {figures['loss_megatron']:.6f}"
    yield from (f"  {note}" for note in verdict.notes)
