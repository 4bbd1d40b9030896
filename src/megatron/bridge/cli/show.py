# SPDX-License-Identifier: Apache-2.0
"""What was found at a checkpoint root, as a JSON document and as text."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import click

from megatron.bridge.cli.text import human_bytes, notes_of, printable
from megatron.bridge.release_checkpoint.doubts import doubts
from megatron.bridge.release_checkpoint.examine import Checkpoint
from megatron.bridge.release_checkpoint.layout import ITERATION_0, RELEASE, RUN_CONFIG
from megatron.bridge.release_checkpoint.proof import Proof, recorded
from megatron.bridge.release_checkpoint.state import FORMS
from megatron.bridge.release_checkpoint.verdicts import Verdict, grouped, launch_flags, verdicts
from megatron.bridge.repair import repair
from megatron.bridge.repair.problems import problems


def describe(found: Checkpoint) -> dict[str, Any]:
    """Return the document that `inspect --json` prints."""
    with notes_of("megatron.bridge.release_checkpoint.flags") as notes:
        document = _document(found)
    return document | {"notes": notes}


def _document(found: Checkpoint) -> dict[str, Any]:
    payload = found.payload
    wrong = problems(found)
    return {
        "path": str(found.root),
        "ok": not wrong,
        "tracker": found.tracker,
        "layout": found.layout,
        "folders": found.folders,
        "link": found.link,
        "leftovers": found.leftovers,
        "payload": payload
        and {
            "folder": payload.path.name,
            "format": payload.format,
            "core": payload.core,
            "ranks": len(payload.ranks.files) if payload.ranks else None,
            "common_state": payload.common,
            "iteration": payload.iteration,
            "optimizer": payload.has_optimizer,
            "args": vars(payload.args) if payload.args else None,
            "parallelism": payload.parallelism,
            "parameters": payload.parameters,
            "dtypes": payload.dtypes,
            "bytes": payload.size,
            "run_config": payload.has(RUN_CONFIG),
        },
        "proof": asdict(_proof(found)),
        "problems": [{"what": each.what, "repairable": each.repairable} for each in wrong],
        "repair": _repair_command(found) if any(each.repairable for each in wrong) else None,
        "readers": [{"reader": each.reader, "loads": each.loads, "why": each.why} for each in verdicts(found)],
        "flags": launch_flags(found),
    }


def _proof(found: Checkpoint) -> Proof:
    """Return what the import recorded, or what it should have, which holds for what was trained from it, too."""
    if found.payload is None:
        return Proof()
    folder = found.payload.path if found.payload.has(RUN_CONFIG) else found.root / RELEASE
    proof = recorded(folder)
    return replace(proof, unproved=[*proof.unproved, *(doubts(folder) if folder.name == RELEASE else ())])


def _repair_command(found: Checkpoint) -> list[str] | None:
    plan = repair.foresee(found)
    if plan is None:
        return None
    return ["megatron-bridge", "repair", str(plan.root), *(["--hf-model", plan.hf_model] if plan.hf_model else [])]


def show(document: dict[str, Any]) -> None:
    """Print a document as text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(document):
        facts.add_row(name, value)
    console.print(facts)
    readers = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    readers.add_column("reader", overflow="fold")
    readers.add_column("loads", no_wrap=True)
    readers.add_column("why", overflow="fold")
    colours = {"yes": "green", "partly": "yellow", "unknown": "yellow", "no": "red"}
    for each in grouped([Verdict(**reader) for reader in document["readers"]]):
        readers.add_row(each.reader, f"[{colours[each.loads]}]{each.loads}[/]", _escaped(each.why))
    console.print(readers)
    for problem in document["problems"]:
        console.print(f"[red]✗[/] {_escaped(problem['what'])}", soft_wrap=True)
    if document["repair"]:
        console.print(f"\nRepair it with: {_escaped(shlex.join(document['repair']))}", soft_wrap=True)
    if not document["problems"]:
        console.print("[green]✓[/] No problems found.\n")
    if not document["problems"]:
        _print_flags(document["flags"], document["notes"])


def _facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts of a checkpoint, one a line."""
    yield "path", _escaped(document["path"])
    payload = document["payload"]
    if payload is None and not document["tracker"]:
        return
    yield "tracker", _escaped(document["tracker"]) if document["tracker"] is not None else "none"
    folders = [*document["folders"], *document["leftovers"]]
    if payload:
        folders = [f"{name} (shown here)" if name == payload["folder"] and folders[1:] else name for name in folders]
    if document["link"] is not None:
        folders.append(f"{ITERATION_0} (a link to {_escaped(document['link'])})")
    yield "folders", ", ".join(folders) or "none"
    if payload is None:
        return
    ranks = f" of {payload['ranks']} ranks" if payload["ranks"] else ""
    core = payload["core"] or "(unknown)"
    yield "format", f"{payload['format'] or 'unknown'}{ranks}, written by Megatron Core {core}"
    if payload["common_state"]:
        forms = FORMS if payload["common_state"] == "both" else [payload["common_state"]]
        yield "common state", f"in {' and in '.join(FORMS.get(form, form) for form in forms)}"
    args = payload["args"]
    yield "args", f"{len(args)} fields" if args else "none"
    if args:
        sizes = payload["parallelism"] or {}
        yield "saved with", ", ".join(f"{letters} {size}" for letters, size in sizes.items()) or "unknown"
    if payload["optimizer"] or payload["iteration"]:
        state = "with" if payload["optimizer"] else "without"
        yield "training", f"iteration {payload['iteration']}, {state} optimizer state"
    if payload["parameters"] is not None:
        yield "parameters", f"{payload['parameters']:,} in {', '.join(payload['dtypes'])}"
    yield "size", human_bytes(payload["bytes"])
    proof = document["proof"]
    for name, lines in (("left out", proof["left_out"]), ("not proved", proof["unproved"])):
        for line in lines:
            yield name, f"[yellow]{_escaped(line)}[/]"
    if proof["adapter"]:
        yield "adapter", _escaped(f"{proof['adapter']}, merged")
    if proof["verdict"]:
        yield "verified", _escaped(_verdict(proof["verdict"]))


def _verdict(verdict: Mapping[str, Any]) -> str:
    """Return a recorded verdict in a line. The file may hold anything."""
    line, notes, figures = (
        f"{verdict.get('verdict')} ({verdict.get('of')})",
        verdict.get("notes"),
        verdict.get("figures"),
    )
    if isinstance(figures, dict):
        found, largest = figures.get("largest_difference"), figures.get("largest_logit")
        if isinstance(found, float) and isinstance(largest, float) and largest:
            line += f", largest difference {found / largest:.1e} of the largest logit"
    return f"{line}: {'; '.join(map(str, notes))}" if isinstance(notes, list) and notes else line


def show_flags(found: Checkpoint) -> None:
    """Print the flags with which Megatron-LM starts from a checkpoint, or why there are none."""
    document = describe(found)
    _print_flags(document["flags"], document["notes"])


def _print_flags(flags: Mapping[str, Sequence[str]] | None, notes: list[str]) -> None:
    if flags is not None:
        click.echo("Megatron-LM starts from it with:")
        click.echo(f"  {shlex.join(flags['use_checkpoint_args'])}")
        click.echo("or, without --use-checkpoint-args, with:")
        click.echo(f"  {shlex.join(flags['without'])}")
    for note in notes:
        click.echo(f"Note: {printable(note)}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))
