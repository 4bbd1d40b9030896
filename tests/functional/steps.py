# SPDX-License-Identifier: Apache-2.0
"""The steps of a run. Each is a process with its own log, and a failure names the step, the command, and the log.

A training step runs Megatron-LM's loop (`train.py`) with the flags below. Conversions are called directly, as a user
would call them.
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

# The training flags of every platform. Conversations are drawn in order, so that every run sees the same ones.
TRAINING_FLAGS = (
    "--seq-length=128",
    "--micro-batch-size=2",
    "--global-batch-size=8",
    "--lr=2e-3",
    "--lr-decay-style=constant",
    "--weight-decay=0",
    "--seed=1234",
    # The loss is the mean over all tokens of a batch, however ranks and micro-batches cut it: all layouts train alike.
    "--calculate-per-token-loss",
    "--num-workers=0",
    "--log-interval=1",
    "--eval-iters=1",
    "--eval-interval=1000000",  # only after the last iteration
    "--save-interval=1000000",
    "--tokenizer-type=HuggingFaceTokenizer",
)

PLATFORM_VARIABLE = "FUNCTIONAL_PLATFORM"  # "cpu", "cuda", or "rocm"; default: the platform that is found
MEGATRON_LM_VARIABLE = "FUNCTIONAL_MEGATRON_LM"  # a checkout of Megatron-LM; its pretrain_gpt.py trains


@functools.cache
def host() -> platforms.Host:
    """Return the host that every step of this process runs on, and inspect it only once.

    Raises:
        PlatformError: This host doesn't have the platform that `FUNCTIONAL_PLATFORM` names.
    """
    return platforms.get(os.environ.get(PLATFORM_VARIABLE))


def megatron_lm() -> Path | None:
    """Return the checkout of Megatron-LM that trains instead of the wheel's `megatron.training`, if there is one."""
    given = os.environ.get(MEGATRON_LM_VARIABLE)
    return Path(given) if given else None


def whole_checkout() -> list[str]:
    """Return the flag of `train.py` that trains with the checkout's own script, if there is a checkout."""
    return [f"--megatron-lm={megatron_lm()}"] if megatron_lm() else []


def packages_of_checkout() -> list[str]:
    """Return the flag of `train.py` that uses the checkout's packages but not its script, if there is a checkout.

    With `finetune.py` all versions see the same batches. An older `pretrain_gpt.py --sft` may not read tokenizers with
    the installed transformers.
    """
    return [f"--packages-of={megatron_lm()}"] if megatron_lm() else []


def sft_flags() -> list[str]:
    """Return the flags that train on packed conversations.

    `pretrain_gpt.py` must use Megatron-LM's own `SFTTokenizer`. It recognizes the assistant's tokens in two of
    NVIDIA's templates only, and otherwise puts the loss on all tokens
    (`megatron/core/tokenizers/text/libraries/sft_tokenizer.py`, core 0.19). `tokenizer.py` makes the tokens for one of
    the two.
    """
    # Packed samples of a micro-batch are concatenated, but the next pipeline stage expects a batch dimension
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
    """A step ended with an error or took too long; `log` is the path of its log."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Step:
    """One process, or one group of ranks.

    Attributes:
        name: The purpose of this step, in a word or two.
        command: Program and arguments.
        log: The file for everything that it prints.
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
            StepFailed: The exit code is not 0, or the time is over. The message has the step, the last error in its
                log, the command that runs it alone, and the path of the log.
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
        """The command and its variables, for a shell."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in settings().items()), *self.command])

    def _message(self, what: str) -> str:
        return f"step “{self.name}” {what}\n  to run it alone: {self.shown}\n  its log: {self.log}"


def _stop(process: subprocess.Popen) -> None:
    # Kill the group: otherwise torchrun's workers and the checkpoint writer's processes outlive their parent.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_error(log: Path) -> str:
    """Return the last error of a traceback in a log, without the rank prefix."""
    errors = re.findall(
        r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Failed)\b.*)$", log.read_text(), re.M
    )
    # torchrun adds its own error, which says only that a rank failed.
    telling = [error for error in errors if "ChildFailedError" not in error]
    return telling[-1] if telling else "no exception in its log"


def settings() -> dict[str, str]:
    """Return the environment variables of a step: one thread per rank, no model hub, no warnings."""
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


# Container images often switch bytecode off. Then every process spends seven seconds compiling the modules of torch
# and transformers again. The others are the rendezvous that Bridge left if this process has converted on a GPU.
FORGOTTEN = ("PYTHONDONTWRITEBYTECODE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def environment() -> dict[str, str]:
    """Return the environment of a step: that of this process, without `FORGOTTEN` and with `settings`."""
    return {name: value for name, value in os.environ.items() if name not in FORGOTTEN} | settings()


def launch(script: Path, ranks: int = 1) -> list[str]:
    """Return the beginning of the command that runs a script on a number of ranks."""
    if ranks > 1:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(script),
        ]
    # One rank needs the launcher's variables but no launcher, which would double the start-up time. With port 0 the
    # store takes a free port when it starts; another process could take a port that is chosen here.
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, str(script)]


@dataclass(frozen=True)
class Chats:
    """The conversations of a run and the tokenizer that reads them."""

    train: Path
    valid: Path
    tokenizer: Path | str

    def flags(self, cache: Path) -> list[str]:
        """Return the flags that pass them to Megatron-LM."""
        paths = [f"--train-data-path={self.train}", f"--valid-data-path={self.valid}"]
        return [*paths, f"--data-cache-path={cache}", f"--tokenizer-model={self.tokenizer}"]

    def said_by_others(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[str]:
        """Return the texts that carry loss in training batches and that the assistant says in no conversation.

        Args:
            batches: From `Training.batches`, a row for each conversation. A conversation may be truncated at the end
                of its sequence, so the beginning of an answer counts too, unless no batch has a whole answer.
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
    # Templates put different spaces between turns.
    return "".join(text.split())


class Training:
    """The losses, batches, and log of one training step, read from its folder."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.log = folder / "log.txt"

    def losses(self, split: str = "train") -> dict[int, float]:
        """Read the loss of each iteration, in full precision."""
        return {record["iteration"]: record["loss"] for record in self._records(split)}

    def times(self, split: str = "train") -> dict[int, float]:
        """Read when each iteration ended, in seconds since the epoch."""
        return {record["iteration"]: record["time"] for record in self._records(split)}

    def _records(self, split: str) -> list[dict[str, Any]]:
        lines = (self.folder / "losses.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == split]

    def batches(self, iteration: int, split: str = "train") -> list[dict[str, torch.Tensor]]:
        """Load every micro-batch of one iteration, from all data parallel ranks."""
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
        name: The purpose of this step.
        folder: The folder for log, losses, and batches.
        chats: The training data.
        load: The root of the checkpoint to start or resume from; None if `flags` name it in another way.
        iterations: The iteration to train up to, counted from the beginning of fine-tuning.
        save: The root to save to at the end. Default: `folder / "checkpoint"`.
        megatron_lm: Flags of `train.py` that choose the Megatron-LM. Default: `whole_checkout()`.
        flags: More flags of Megatron-LM. They come last, so they override those from here.
        ranks: The number of ranks.
        limit_s: Seconds until the step is stopped.
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
    """Return the flags of Megatron-LM that describe a checkpoint's model, according to Bridge.

    Args:
        checkpoint: The root of a checkpoint with Megatron-LM's args.
        use_checkpoint_args: Return only flags that Megatron-LM doesn't read from the args. Otherwise return all.
        in_float32: Leave out the precision, so that Megatron-LM computes in float32 with weights of any dtype.
    """
    from megatron.bridge.release_checkpoint.flags import megatron_lm_flags
    from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args

    flags = megatron_lm_flags(read_megatron_lm_args(checkpoint), use_checkpoint_args=use_checkpoint_args)
    return [flag for flag in flags if not (in_float32 and flag in ("--bf16", "--fp16"))]


def tracker(root: Path) -> str:
    """Read the tracker of a checkpoint."""
    return (root / TRACKER).read_text()


def payloads(root: Path) -> list[str]:
    """Return the names of the folders in the root of a checkpoint."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def model_tensors(payload: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the weights of a payload with PyTorch's own reader, one after the other.

    Args:
        payload: A `release` or `iter_N` folder in PyTorch's distributed format.

    Yields:
        The name and tensor of each weight, without the state of optimizer and RNG.
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
