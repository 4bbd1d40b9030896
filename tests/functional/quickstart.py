# SPDX-License-Identifier: Apache-2.0
"""The whole way, shown step by step: Hugging Face → release checkpoint → Megatron-LM → Hugging Face.

    nox -s quickstart                                     # a small Llama 3 that is made on the spot
    nox -s quickstart -- --hf-model PATH_OR_ID --out DIR  # your own checkpoint

It runs what the functional tests run, with the same functions.
"""

import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree


sys.dont_write_bytecode = False  # three times as fast from the second start on; see `steps.environment`
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

MADE_HERE = ("hf", "chats", "megatron", "fine-tuned", "logs")
ITERATIONS = 20
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient, and Adam's two moments
# Megatron-LM's own words about the checkpoint, of all that it logs.
TELLING = re.compile(r"(?:loading|successfully loaded|successfully saved) (?:release )?(?:distributed )?checkpoint")

console = Console(highlight=False, file=sys.stdout)  # this very stream, also while packages are kept quiet
quiet_logs: list[IO[str]] = []


class Problem(Exception):
    """What the user has to change, in one line."""


class Clock:
    """Runs the steps one by one, says which, and keeps how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.time()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and note its time when it is done."""
        console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        before = time.time()
        yield
        self.seconds[title] = time.time() - before
        console.print(f"[dim]{self.seconds[title]:.1f} s[/]\n")

    def table(self) -> Table:
        """Say where the time went."""
        table = Table("step", title="Where the time went", title_justify="left")
        table.add_column("seconds", justify="right")
        for title, seconds in self.seconds.items():
            table.add_row(title, f"{seconds:.1f}")
        table.add_row("[bold]in all", f"[bold]{time.time() - self.started:.1f}")
        return table


def main() -> None:
    """Show everything, or the one line that says what is wrong."""
    parser = argparse.ArgumentParser(description="From Hugging Face to Megatron-LM and back.")
    parser.add_argument(
        "--hf-model", metavar="PATH_OR_ID", help="your checkpoint (default: a small Llama 3 made here)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("quickstart"), help="where everything goes")
    options = parser.parse_args()
    try:
        show(options.hf_model, options.out.absolute())
    except Exception as error:
        import steps  # not before: torch comes with it, and its import is a step

        if not isinstance(error, Problem | steps.StepFailed):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def show(hf_model: str | None, out: Path) -> None:
    """Go the whole way.

    Args:
        hf_model: A folder, the name of a model on the hub, or None for one that is made here.
        out: Folder for everything that is written.

    Raises:
        Problem: something that the user has to change.
        StepFailed: Megatron-LM ended with an error.
    """
    clock = Clock()
    prepare(out)
    with clock.step("The Hugging Face checkpoint" if hf_model else "Make a small Llama 3 in Hugging Face's form"):
        source = take_model(hf_model, out)
        chats = make_chats(source, out)
    with clock.step("Import Megatron-Bridge, and of its families the model's"), waiting("importing"):
        bridge = import_bridge(source, out)
    checkpoint = out / "megatron"
    with clock.step("AutoBridge.import_ckpt"), quietly(out):
        with waiting("converting"):
            bridge.import_ckpt(str(source), str(checkpoint))
        flags = show_checkpoint(checkpoint)
    with clock.step("Fine-tune with Megatron-LM, on what the assistant says"):
        console.print("flags about the model:", escape(" ".join(flags)), "\n")
        first = train("fine-tuning", checkpoint, chats, flags, out, until=ITERATIONS // 2, plan=ITERATIONS)
    with clock.step("Resume in a new process"):
        second = train("resuming", checkpoint, chats, flags, out, until=ITERATIONS, plan=ITERATIONS)
    with clock.step("Export to Hugging Face, and compare"), quietly(out):
        with waiting("converting"):
            bridge.from_hf_pretrained(str(source)).export_ckpt(
                str(checkpoint), str(out / "fine-tuned"), show_progress=False
            )
        compare(out / "fine-tuned", second)
    losses = first.losses() | second.losses()
    console.print(f"loss {losses[1]:.4f} → {losses[ITERATIONS]:.4f} over {ITERATIONS} iterations\n")
    console.print(tree(out))
    console.print(clock.table())


def prepare(out: Path) -> None:
    """Make the folder, and clear what an earlier quickstart left there; nothing else is touched."""
    if out.exists() and not out.is_dir():
        raise Problem(f"{out} is a file; give a folder with --out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in MADE_HERE) if out.exists() else []
    if foreign:
        raise Problem(f"{out} holds {foreign[0]}, which no quickstart made; give an empty or new folder with --out")
    for name in MADE_HERE:
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        (out / "logs").mkdir(parents=True)
    except OSError as error:
        raise Problem(f"can't write to {out} ({error.strerror}); give another folder with --out") from None


def import_bridge(source: Path, out: Path) -> type:
    """Import Bridge as `megatron-bridge import` does; what the packages log while they load goes to a file."""
    from megatron.bridge_cli.lean_import import auto_bridge_for

    with quietly(out):
        return auto_bridge_for(str(source))


def take_model(hf_model: str | None, out: Path) -> Path:
    """Make the small model, or find the user's own, on disk or on the hub."""
    if hf_model is None:
        import models

        with quietly(out):
            source = models.make_model(out / "hf")
    elif Path(hf_model).exists():
        source = Path(hf_model).absolute()
    else:
        source = download(hf_model)
    console.print(source)
    check_memory(source)
    return source


def download(name: str) -> Path:
    """Fetch a model from the hub into Hugging Face's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]))
    except Exception as error:  # the hub's client has a dozen kinds, and each says what is wrong in its first line
        reason = str(error).strip().splitlines()[0]
        raise Problem(
            f"{name} is neither a folder here nor a model on the hub that can be fetched: {reason}"
        ) from None


def check_memory(source: Path) -> None:
    """Refuse a model whose training doesn't fit into this host."""
    from reference import Tensors

    weights = sum(Tensors(source).sizes())
    needed, free = weights * BYTES_PER_WEIGHT, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    console.print(f"{weights / 1e6:,.2f} million weights")
    if needed > free:
        raise Problem(
            f"training {weights / 1e9:.1f} billion weights in float32 takes {needed / 2**30:.0f} GiB, and"
            f" {free / 2**30:.0f} GiB are free; take a smaller model, or a larger host"
        )


def make_chats(source: Path, out: Path):
    """Write conversations, and check that the model's tokenizer can read them."""
    import steps
    from chat import ChatTokenizer, conversations, write_conversations

    try:
        tokenizer = ChatTokenizer(str(source))
        sample = next(conversations(1))
        tokenizer.tokenize_conversation(sample, return_target=True)
    except (OSError, ValueError) as error:
        raise Problem(f"the tokenizer of {source} doesn't take conversations: {error}") from None
    for message in sample[1:]:
        console.print(f"[dim]{message['role']}:[/] {message['content']}")
    return steps.Chats(
        train=write_conversations(out / "chats" / "train.jsonl", 128),
        valid=write_conversations(out / "chats" / "valid.jsonl", 32, seed=2),
        tokenizer=source,
    )


def show_checkpoint(checkpoint: Path) -> list[str]:
    """Show what the import wrote, and give the flags with which Megatron-LM starts from it."""
    import steps

    from megatron.bridge.training.mlm_compat.checkpoint_args import read_megatron_lm_args

    console.print(tree(checkpoint))
    console.print(f"{steps.TRACKER}: [bold]{steps.tracker(checkpoint)}[/]")
    args = vars(read_megatron_lm_args(checkpoint))
    shown = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "rotary_base",
        "padded_vocab_size",
    )
    console.print("args:", ", ".join(f"{name}={args[name]}" for name in shown), f"… {len(args)} in all")
    return steps.model_flags(checkpoint, in_float32=True)


def train(title: str, checkpoint: Path, chats, flags: list[str], out: Path, until: int, plan: int):
    """Train up to an iteration, saving beside the release, and show the losses as they come."""
    import steps

    start = time.time()
    with waiting(f"Megatron-LM is starting; log: {out / 'logs' / title / 'log.txt'}"):
        training = steps.train(
            title,
            out / "logs" / title,
            chats,
            load=checkpoint,
            save=checkpoint,
            iterations=plan,
            flags=[*flags, f"--exit-interval={until}"] if until < plan else flags,
            on_line=show_line,
        )
    first = min(training.times().values()) - start
    console.print(f"tracker: [bold]{steps.tracker(checkpoint)}[/]; {first:.1f} s until the first loss")
    return training


def show_line(line: str) -> None:
    """Print what a line of Megatron-LM's log says about the checkpoint or the loss."""
    if found := re.match(r"(train|valid) iteration (\d+): loss (\S+)", line):
        kind = "" if found[1] == "train" else "on conversations that it wasn't trained on, "
        console.print(f"iteration {found[2]:>3}  {kind}loss {float(found[3]):.6f}")
    elif TELLING.search(line):
        console.print(f"[dim]{escape(line.strip())}[/]", soft_wrap=True)


def compare(model: Path, training) -> None:
    """Ask transformers for the loss on the batch that Megatron-LM evaluated last."""
    from matrix import TOLERANCES
    from reference import hf_loss
    from steps import host

    expected, found = training.losses("valid")[ITERATIONS], hf_loss(model, training.batches(ITERATIONS, "valid"))
    console.print(f"loss on held-out conversations: Megatron-LM {expected:.6f}, transformers {found:.6f}")
    if abs(expected - found) > TOLERANCES[host().platform.name].implementation:
        raise Problem(
            f"the two losses differ by {abs(expected - found):.2g}, more than rounding explains: please report it"
        )


def tree(folder: Path) -> Tree:
    """Draw a folder with the sizes of its files, without what data loaders and batches left."""
    drawn = Tree(f"[bold]{folder}")
    grow(drawn, folder)
    return drawn


def grow(branch: Tree, folder: Path) -> None:
    """Add what is in a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("cache", "batches"):
            grow(branch.add(f"{path.name}/"), path)
        elif path.is_file():
            branch.add(f"{path.name} [dim]{path.stat().st_size:,}")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something goes on."""
    before = time.time()
    with console.status(escape(what)) if console.is_terminal else contextlib.nullcontext():
        yield
    if not console.is_terminal and time.time() - before > 1:
        console.print(f"[dim]{escape(what)}: {time.time() - before:.1f} s[/]", soft_wrap=True)


@contextlib.contextmanager
def quietly(out: Path) -> Iterator[None]:
    """Send what packages print and log to a file, and leave the console to this script."""
    if not quiet_logs:  # one file, never closed: a package may keep the stream that it found when it was imported
        quiet_logs.append((out / "logs" / "conversion.txt").open("a", buffering=1))
        logging.basicConfig(handlers=[logging.StreamHandler(quiet_logs[0])], level=logging.INFO)
    with contextlib.redirect_stdout(quiet_logs[0]), contextlib.redirect_stderr(quiet_logs[0]):
        yield


if __name__ == "__main__":
    main()
