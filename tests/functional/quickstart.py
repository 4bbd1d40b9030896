# SPDX-License-Identifier: Apache-2.0
"""Go all the way, step by step: Hugging Face → release checkpoint → Megatron-LM → Hugging Face.

    nox -s quickstart                                     # make and use a small Llama 3
    nox -s quickstart -- --hf-model PATH_OR_ID --out DIR  # use your own model

It calls the functions of the functional tests.
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


sys.dont_write_bytecode = False  # three times as fast from the second start on; see `steps.FORGOTTEN`
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

MADE_HERE = ("hf", "chats", "megatron", "fine-tuned", "logs")
ITERATIONS = 20
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient, and Adam's two moments
# What Megatron-LM logs about the checkpoint.
TELLING = re.compile(r"(?:loading|successfully loaded|successfully saved) (?:release )?(?:distributed )?checkpoint")

console = Console(highlight=False, file=sys.stdout)  # this stream, even while the output of packages is redirected
quiet_logs: list[IO[str]] = []


class Problem(Exception):
    """An error that the user can fix, in one line."""


class Clock:
    """Announces each step, and records how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.time()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and record its time when it is done."""
        console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        before = time.time()
        yield
        self.seconds[title] = time.time() - before
        console.print(f"[dim]{self.seconds[title]:.1f} s[/]\n")

    def table(self) -> Table:
        """Return a table of the time of each step."""
        table = Table("step", title="Where the time went", title_justify="left")
        table.add_column("seconds", justify="right")
        for title, seconds in self.seconds.items():
            table.add_row(title, f"{seconds:.1f}")
        table.add_row("[bold]total", f"[bold]{time.time() - self.started:.1f}")
        return table


def main() -> None:
    """Run the quickstart, or print an error in one line."""
    parser = argparse.ArgumentParser(description="Import a model, fine-tune it with Megatron-LM, and export it.")
    parser.add_argument(
        "--hf-model", metavar="PATH_OR_ID", help="use this model; default: a small Llama 3 that is made here"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("quickstart"), help="default: %(default)s")
    options = parser.parse_args()
    try:
        show(options.hf_model, options.out.absolute())
    except Exception as error:
        import steps  # late, because it imports torch, which is a step

        if not isinstance(error, Problem | steps.StepFailed):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def show(hf_model: str | None, out: Path) -> None:
    """Import, fine-tune, resume, export, and compare.

    Args:
        hf_model: A folder, the name of a model on the hub, or None to make one here.
        out: The folder for everything that is written.

    Raises:
        Problem: The user can fix something.
        StepFailed: Megatron-LM ended with an error.
    """
    clock = Clock()
    prepare(out)
    with clock.step("Get the Hugging Face model" if hf_model else "Make a small Llama 3 in Hugging Face format"):
        source = take_model(hf_model, out)
        chats = make_chats(source, out)
    with clock.step("Load Megatron-Bridge, with the model's family only"), waiting("importing"):
        bridge = import_bridge(out)
    checkpoint = out / "megatron"
    with clock.step("AutoBridge.import_ckpt"), quietly(out):
        with waiting("converting"):
            bridge.import_ckpt(str(source), str(checkpoint))
        flags = show_checkpoint(checkpoint)
    with clock.step("Fine-tune with Megatron-LM on the assistant's answers"):
        console.print("flags that describe the model:", escape(" ".join(flags)), "\n")
        first = train("fine-tuning", checkpoint, chats, flags, out, until=ITERATIONS // 2, plan=ITERATIONS)
    with clock.step("Resume in a new process"):
        second = train("resuming", checkpoint, chats, flags, out, until=ITERATIONS, plan=ITERATIONS)
    with clock.step("Export to Hugging Face and compare the losses"), quietly(out):
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
    """Make the folder, and remove the files of an earlier quickstart, but no others."""
    if out.exists() and not out.is_dir():
        raise Problem(f"{out} is a file; pass a folder with --out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in MADE_HERE) if out.exists() else []
    if foreign:
        raise Problem(f"{out} holds {foreign[0]}, which no quickstart made; pass an empty or new folder with --out")
    for name in MADE_HERE:
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        (out / "logs").mkdir(parents=True)
    except OSError as error:
        raise Problem(f"can't write to {out} ({error.strerror}); pass another folder with --out") from None


def import_bridge(out: Path) -> type:
    """Load Bridge as `megatron-bridge import` does, and write what packages log meanwhile to a file."""
    from megatron.bridge.utils.deferred import lean_imports

    with quietly(out), lean_imports():
        from megatron.bridge import AutoBridge

        return AutoBridge


def take_model(hf_model: str | None, out: Path) -> Path:
    """Make the small model, or find the user's model on disk or on the hub."""
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
    """Download a model from the hub into Hugging Face's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]))
    except Exception as error:  # the hub's client has a dozen kinds; the first line of each says what is wrong
        reason = str(error).strip().splitlines()[0]
        raise Problem(f"{name} is not a folder here, and can't be downloaded from the hub: {reason}") from None


def check_memory(source: Path) -> None:
    """Refuse a model that needs more memory for training than this host has."""
    from reference import Tensors

    weights = sum(Tensors(source).sizes())
    needed, free = weights * BYTES_PER_WEIGHT, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    console.print(f"{weights / 1e6:,.2f} million weights")
    if needed > free:
        raise Problem(
            f"training {weights / 1e9:.1f} billion weights in float32 needs {needed / 2**30:.0f} GiB of memory, and"
            f" {free / 2**30:.0f} GiB are free; use a smaller model or a larger host"
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
        raise Problem(f"the tokenizer of {source} can't read conversations: {error}") from None
    for message in sample[1:]:
        console.print(f"[dim]{message['role']}:[/] {message['content']}")
    return steps.Chats(
        train=write_conversations(out / "chats" / "train.jsonl", 128),
        valid=write_conversations(out / "chats" / "valid.jsonl", 32, seed=2),
        tokenizer=source,
    )


def show_checkpoint(checkpoint: Path) -> list[str]:
    """Show what the import wrote, and return the flags with which Megatron-LM starts from it."""
    import steps

    from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args

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
    console.print("args:", ", ".join(f"{name}={args[name]}" for name in shown), f"… ({len(args)} in total)")
    return steps.model_flags(checkpoint, in_float32=True)


def train(title: str, checkpoint: Path, chats, flags: list[str], out: Path, until: int, plan: int):
    """Train up to an iteration, save beside the release checkpoint, and show the losses as they come."""
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
    console.print(f"tracker: [bold]{steps.tracker(checkpoint)}[/]; first loss after {first:.1f} s")
    return training


def show_line(line: str) -> None:
    """Print a line of Megatron-LM's log if it is about the checkpoint or the loss."""
    if found := re.match(r"(train|valid) iteration (\d+): loss (\S+)", line):
        kind = "" if found[1] == "train" else "held-out conversations, "
        console.print(f"iteration {found[2]:>3}  {kind}loss {float(found[3]):.6f}")
    elif TELLING.search(line):
        console.print(f"[dim]{escape(line.strip())}[/]", soft_wrap=True)


def compare(model: Path, training) -> None:
    """Compare the loss of transformers on the batch that Megatron-LM evaluated last."""
    from matrix import TOLERANCES
    from reference import hf_loss
    from steps import host

    expected, found = training.losses("valid")[ITERATIONS], hf_loss(model, training.batches(ITERATIONS, "valid"))
    console.print(f"loss on held-out conversations: Megatron-LM {expected:.6f}, transformers {found:.6f}")
    if abs(expected - found) > TOLERANCES[host().platform.name].implementation:
        raise Problem(
            f"the two losses differ by {abs(expected - found):.2g}, more than rounding explains; please report it"
        )


def tree(folder: Path) -> Tree:
    """Return a tree of a folder with the sizes of its files, without caches and batches."""
    drawn = Tree(f"[bold]{folder}")
    grow(drawn, folder)
    return drawn


def grow(branch: Tree, folder: Path) -> None:
    """Add the content of a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ("cache", "batches"):
            grow(branch.add(f"{path.name}/"), path)
        elif path.is_file():
            branch.add(f"{path.name} [dim]{path.stat().st_size:,}")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something is running."""
    before = time.time()
    with console.status(escape(what)) if console.is_terminal else contextlib.nullcontext():
        yield
    if not console.is_terminal and time.time() - before > 1:
        console.print(f"[dim]{escape(what)}: {time.time() - before:.1f} s[/]", soft_wrap=True)


@contextlib.contextmanager
def quietly(out: Path) -> Iterator[None]:
    """Redirect what packages print and log to a file, so that the console is for this script only."""
    if not quiet_logs:  # one file, never closed, because a package may keep the stream that it found at import
        quiet_logs.append((out / "logs" / "conversion.txt").open("a", buffering=1))
        logging.basicConfig(handlers=[logging.StreamHandler(quiet_logs[0])], level=logging.INFO)
    with contextlib.redirect_stdout(quiet_logs[0]), contextlib.redirect_stderr(quiet_logs[0]):
        yield


if __name__ == "__main__":
    main()
