# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, each a process of its own with its log: a failure names the step, the command and the log.

A step that trains is Megatron-LM's loop (`train.py`) with flags from here; conversion is called where it is needed, as
a user would.
"""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platforms
import torch
from chat import spoken


HERE = Path(__file__).parent
TRACKER = (
    "latest_checkpointed_iteration.txt"  # `megatron/training/checkpointing.py`, `get_checkpoint_tracker_filename`
)
TIME_LIMIT_S = 600

# What is trained on, and how, whatever the platform. Conversations are drawn in order, so that every run sees the
# same.
TRAINING_FLAGS = (
    "--seq-length=128",
    "--micro-batch-size=2",
    "--global-batch-size=8",
    "--lr=2e-3",
    "--lr-decay-style=constant",
    "--weight-decay=0",
    "--seed=1234",
    # The mean over all tokens of a batch, however ranks and micro-batches cut it: all layouts then train alike.
    "--calculate-per-token-loss",
    "--num-workers=0",
    "--log-interval=1",
    "--eval-iters=1",
    "--eval-interval=1000000",  # only after the last iteration
    "--save-interval=1000000",
    "--tokenizer-type=HuggingFaceTokenizer",
)

PLATFORM_VARIABLE = "FUNCTIONAL_PLATFORM"  # "cpu", "cuda" or "rocm"; without it, what is found
MEGATRON_LM_VARIABLE = "FUNCTIONAL_MEGATRON_LM"  # a checkout of Megatron-LM whose pretrain_gpt.py trains


@functools.cache
def host() -> platforms.Host:
    """Look, once, at what every step of this process runs on.

    Raises:
        PlatformError: the platform that `FUNCTIONAL_PLATFORM` names is not here.
    """
    return platforms.get(os.environ.get(PLATFORM_VARIABLE))


def megatron_lm() -> Path | None:
    """Give the checkout of Megatron-LM that trains in place of the wheel's `megatron.training`, if one was given."""
    given = os.environ.get(MEGATRON_LM_VARIABLE)
    return Path(given) if given else None


def whole_checkout() -> list[str]:
    """Give the flag of `train.py` that trains with that checkout's own script, if one was given."""
    return [f"--megatron-lm={megatron_lm()}"] if megatron_lm() else []


def packages_of_checkout() -> list[str]:
    """Give the flag of `train.py` that takes its packages alone: with `finetune.py` all versions see the same batches.

    And an older `pretrain_gpt.py --sft` may not read the tokenizers of the transformers that is installed.
    """
    return [f"--packages-of={megatron_lm()}"] if megatron_lm() else []


def sft_flags() -> list[str]:
    """Give the flags that train on packed conversations.

    `pretrain_gpt.py` has to use Megatron-LM's own `SFTTokenizer`, which finds the assistant's tokens in two templates
    of NVIDIA's only and else puts the loss on all (`megatron/core/tokenizers/text/libraries/sft_tokenizer.py`, core
    0.19); `tokenizer.py` makes the tokens that the one here needs.
    """
    # Packed samples of a micro-batch lie one behind the other, and the next pipeline stage expects them side by side
    # (`megatron/core/utils.py`, `flatten_batch_for_packed_sequences`, core 0.19).
    flags = ["--sft", "--micro-batch-size=1"]
    if not megatron_lm():
        return flags
    return [
        *flags,
        "--no-create-attention-mask-in-dataloader",
        "--tokenizer-type=SFTTokenizer",
        "--sft-tokenizer-prompt-format=nemotron-nano-v2",
    ]


class StepFailed(Exception):
    """A step ended with an error, or took too long; `log` is the path of its log."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Step:
    """One process, or one group of ranks.

    Attributes:
        name: What this step is for, in a word or two.
        command: Program and arguments.
        log: Where everything that it prints is kept.
    """

    name: str
    command: Sequence[str]
    log: Path

    def run(self, on_line: Callable[[str], None] = lambda line: None, limit_s: float = TIME_LIMIT_S) -> None:
        """Run to the end.

        Args:
            on_line: Called with each line as it is printed.
            limit_s: Seconds until the step is stopped.

        Raises:
            StepFailed: the exit code is not 0, or the time is over; says which step, the last error in its log, the
                command that runs it alone, and the path of the log.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            log.write(f"$ {self.shown}\n")
            log.flush()
            process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment(),
                start_new_session=True,
            )
            stopped = threading.Event()
            timer = threading.Timer(limit_s, lambda: (stopped.set(), _stop(process)))
            timer.start()
            try:
                for line in process.stdout:
                    log.write(line)
                    on_line(line.rstrip("\n"))
                process.wait()
            finally:
                timer.cancel()
                _stop(process)
        if stopped.is_set():
            raise StepFailed(self._message(f"took more than {limit_s:.0f} s"), self.log)
        if process.returncode:
            what = f"ended with code {process.returncode}: {last_error(self.log)}"
            raise StepFailed(self._message(what), self.log)

    @property
    def shown(self) -> str:
        """The command with the variables that it needs, for a shell."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in settings().items()), *self.command])

    def _message(self, what: str) -> str:
        return f"step “{self.name}” {what}\n  to run it alone: {self.shown}\n  its log: {self.log}"


def _stop(process: subprocess.Popen) -> None:
    # The group and not the process: torchrun's workers and the checkpoint writer's processes outlive their parent
    # otherwise.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_error(log: Path) -> str:
    """Give the last line of a log that ends a traceback, without its rank prefix."""
    errors = re.findall(
        r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Failed)\b.*)$", log.read_text(), re.M
    )
    # torchrun adds its own, which says no more than that a rank failed.
    telling = [error for error in errors if "ChildFailedError" not in error]
    return telling[-1] if telling else "no exception in its log"


def settings() -> dict[str, str]:
    """Give the variables that a step has of its own: one thread a rank, no model hub, warnings off."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        **host().platform.environment,
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


# Without bytecode, which container images like to switch off, every process spends seven seconds compiling torch's and
# transformers' modules anew. Where this process has converted on a GPU, Bridge has left its rendezvous in the rest.
FORGOTTEN = ("PYTHONDONTWRITEBYTECODE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def environment() -> dict[str, str]:
    """Make the environment of a step: this process's without `FORGOTTEN`, and with `settings`."""
    return {name: value for name, value in os.environ.items() if name not in FORGOTTEN} | settings()


def launch(script: Path, ranks: int = 1) -> list[str]:
    """Make the start of the command for a script on a number of ranks."""
    if ranks > 1:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(script),
        ]
    # One rank needs no launcher, which takes as long to start as the rank; it needs the launcher's variables. With
    # port 0 the store takes a free one when it is made; one that is chosen here may be taken until the rank is up.
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, str(script)]


@dataclass(frozen=True)
class Chats:
    """The conversations of a run and the tokenizer that reads them."""

    train: Path
    valid: Path
    tokenizer: Path | str

    def flags(self, cache: Path) -> list[str]:
        """Give them to Megatron-LM."""
        paths = [f"--train-data-path={self.train}", f"--valid-data-path={self.valid}"]
        return [*paths, f"--data-cache-path={cache}", f"--tokenizer-model={self.tokenizer}"]

    def said_by_others(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[str]:
        """Give the texts that carry loss in batches of training and are not the assistant's in any conversation.

        Args:
            batches: From `Training.batches`, a row for each conversation. One that was cut off at the end of its
                sequence has the beginning of what the assistant says in it; if all have, none is the assistant's.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        lines = map(json.loads, self.train.read_text().splitlines())
        answers = {_without_spaces(answer) for line in lines for answer in spoken(line["messages"])}
        rows = [row for batch in batches for row in zip(batch["labels"], batch["loss_mask"], strict=True)]
        texts = [tokenizer.decode(labels[mask > 0], skip_special_tokens=True) for labels, mask in rows]
        found = {text: _without_spaces(text) for text in texts}
        whole = answers.intersection(found.values())
        return [
            text for text, said in found.items() if not whole or not any(answer.startswith(said) for answer in answers)
        ]


def _without_spaces(text: str) -> str:
    # Templates put different ones between turns.
    return "".join(text.split())


class Training:
    """What Megatron-LM's loop did in one step: losses, batches and log, read from the folder that it recorded to."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.log = folder / "log.txt"

    def losses(self, split: str = "train") -> dict[int, float]:
        """Read the loss of each iteration, in full precision."""
        return {record["iteration"]: record["loss"] for record in self._records(split)}

    def times(self, split: str = "train") -> dict[int, float]:
        """Read when each iteration was done, in seconds since the epoch."""
        return {record["iteration"]: record["time"] for record in self._records(split)}

    def _records(self, split: str) -> list[dict[str, Any]]:
        lines = (self.folder / "losses.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == split]

    def batches(self, iteration: int, split: str = "train") -> list[dict[str, torch.Tensor]]:
        """Load every micro-batch of one iteration, from all data-parallel ranks."""
        paths = sorted((self.folder / "batches").glob(f"{split}-{iteration:06d}-*.pt"))
        return [torch.load(path, weights_only=True) for path in paths]


def train(
    name: str,
    folder: Path,
    chats: Chats,
    *,
    load: Path | None,
    iterations: int,
    save: Path | None = None,
    megatron_lm: Sequence[str] | None = None,
    flags: Sequence[str] = (),
    ranks: int = 1,
    limit_s: float = TIME_LIMIT_S,
    on_line: Callable[[str], None] = lambda line: None,
) -> Training:
    """Train with Megatron-LM from a checkpoint.

    Args:
        name: What this step is for.
        folder: Where log, losses and batches go.
        chats: What it trains on.
        load: Root of the checkpoint to start or go on from; None if `flags` name it in another way.
        iterations: The iteration to train up to, counted from the beginning of fine-tuning.
        save: Root to save to at the end; `folder / "checkpoint"` if not given.
        megatron_lm: Which Megatron-LM trains: flags of `train.py`, `whole_checkout()` if not given.
        flags: More of Megatron-LM's flags; they go after, and so before, the ones from here.
        ranks: Number of ranks.
        limit_s: Seconds until it is stopped.
        on_line: Called with each line as it is printed.

    Raises:
        StepFailed: Megatron-LM ended with an error.
    """
    training = Training(folder, save or folder / "checkpoint")
    command = [
        *launch(HERE / "train.py", ranks),
        *(whole_checkout() if megatron_lm is None else megatron_lm),
        *([f"--load={load}"] if load else []),
        f"--train-iters={iterations}",
        f"--save={training.checkpoint}",
        *TRAINING_FLAGS,
        *host().flags(),
        *chats.flags(folder / "cache"),
        f"--record={folder}",
        *flags,
    ]
    Step(name, command, training.log).run(on_line, limit_s)
    return training


def model_flags(checkpoint: Path, *, use_checkpoint_args: bool = True, in_float32: bool = False) -> list[str]:
    """Ask Bridge which of Megatron-LM's flags describe a checkpoint's model.

    Args:
        checkpoint: Root of a checkpoint with Megatron-LM args.
        use_checkpoint_args: Only what Megatron-LM doesn't read from there. False gives the whole command line.
        in_float32: Leave out the precision: Megatron-LM computes in float32 whatever the weights are stored in.
    """
    from megatron.bridge.training.mlm_compat.checkpoint_args import megatron_lm_flags, read_megatron_lm_args

    flags = megatron_lm_flags(read_megatron_lm_args(checkpoint), use_checkpoint_args=use_checkpoint_args)
    return [flag for flag in flags if not (in_float32 and flag in ("--bf16", "--fp16"))]


def tracker(root: Path) -> str:
    """Read what a checkpoint's tracker says."""
    return (root / TRACKER).read_text()


def payloads(root: Path) -> list[str]:
    """Name the folders in the root of a checkpoint."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def model_tensors(payload: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the weights in a payload with PyTorch's own reader, one after the other.

    Args:
        payload: A `release` or `iter_N` folder in PyTorch's distributed format.

    Yields:
        Name and tensor of each weight; not what optimizer and RNG keep.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = dcp.FileSystemReader(payload).read_metadata().state_dict_metadata
    for name, entry in sorted(entries.items()):
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(
            ("optimizer.", "rng_state", "rerun_state")
        ):
            state: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
            dcp.load(state, storage_reader=dcp.FileSystemReader(payload), no_dist=True)
            yield name, state[name]
