# SPDX-License-Identifier: Apache-2.0
"""The functional matrix: each row takes a model from Hugging Face to Megatron-LM and back, with one parallel layout.

`ROWS` says what runs, and `Runner` says how. `test_matrix.py` makes each row a test. `nox -s functional` runs the
default set, `nox -s functional -- --all` every row, and `nox -s functional -- --row NAME` one row.
"""

import contextlib
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import models
import primus
import steps
from chat import write_conversations
from packaging.specifiers import SpecifierSet
from platforms import Host
from reference import Tensors, differences, hf_loss
from report import FINE_TUNE, HUGGING_FACE, RESUMED, UNINTERRUPTED, Outcome, Result


HALF, WHOLE = 3, 6  # iterations until the save, and in total
LEAST_FALL = 1.0  # nats: the conversations follow rules, so a model that learns gets far below its first loss
SAVED, FINISHED = f"iter_{HALF:07d}", f"iter_{WHOLE:07d}"
CORE = metadata.version("megatron-core")
COMMAND_VARIABLE = "FUNCTIONAL_COMMAND"  # the nox session that this is, with its own options


@dataclass(frozen=True)
class Layout:
    """A parallel layout.

    Attributes:
        name: The name in the report.
        ranks: The number of ranks.
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        ep: Expert parallel size.
        interleaved: Whether each pipeline stage has two groups of layers.
        sequence_parallel: Whether activations between tensor parallel regions are split along the sequence.
        distributed_optimizer: Whether the optimizer's state is split over data parallel ranks.
    """

    name: str
    ranks: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    interleaved: bool = False
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    def flags(self, layers: int) -> list[str]:
        """Return Megatron-LM's flags for it.

        Args:
            layers: The number of layers of the model.
        """
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--expert-model-parallel-size": self.ep,
        }
        flags = [f"{flag}={size}" for flag, size in sizes.items() if size > 1]
        if self.interleaved:
            flags.append(f"--num-layers-per-virtual-pipeline-stage={layers // self.pp // 2}")
        if self.tp > 1 and self.ep > 1:
            flags.append("--expert-tensor-parallel-size=1")
        if self.sequence_parallel:
            flags.append("--sequence-parallel")
        if self.distributed_optimizer:
            flags.append("--use-distributed-optimizer")
        return flags


ONE = Layout("1 rank")
TP2 = Layout("TP2", 2, tp=2)
TP2_SP = Layout("TP2, sequence parallel", 2, tp=2, sequence_parallel=True)
PP2 = Layout("PP2", 2, pp=2)
PP2_INTERLEAVED = Layout("PP2, interleaved", 2, pp=2, interleaved=True)
DP2 = Layout("DP2", 2)
DP2_OPTIMIZER = Layout("DP2, distributed optimizer", 2, distributed_optimizer=True)
EP2 = Layout("EP2", 2, ep=2)
TP2_EP2 = Layout("TP2 × EP2", 2, tp=2, ep=2, sequence_parallel=True)
ONE_OPTIMIZER = Layout("1 rank, distributed optimizer", distributed_optimizer=True)
TP2_PP2 = Layout("TP2 × PP2", 4, tp=2, pp=2)
TP2_DP2 = Layout("TP2 × DP2", 4, tp=2)
TP4 = Layout("TP4", 4, tp=4)
TP8 = Layout("TP8", 8, tp=8)
TP4_PP2 = Layout("TP4 × PP2", 8, tp=4, pp=2)

# The loss that balances experts depends on which tokens a rank sees together, so layouts would train differently. The
# logged "lm loss" doesn't include it. Without it, layouts train alike to the last digit.
FAMILY_FLAGS = {"qwen3-moe": ("--moe-aux-loss-coeff=0",)}

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}  # enough heads for eight ranks


@dataclass(frozen=True)
class Row:
    """One row of the matrix.

    Attributes:
        model: The family, a key of `models.FAMILIES`.
        layout: The layout of fine-tuning and of the resume.
        other: The layout of a second resume; None on a host that can't run one.
        default: Whether the row runs without `--all`.
        sharded: Whether a model on all ranks of the row saves the release checkpoint, instead of `import_ckpt`.
        packed: Whether a sequence holds several conversations, with `--sft`. With Transformer Engine every row does,
            except those with `primus` or `local`.
        primus: Whether the hook of a checkout of Primus imports the model; see `PrimusRun`.
        local: Whether the row uses Megatron Core's own layers even if Transformer Engine is there.
        vocab_size: The vocabulary of the model. With two tensor parallel ranks, Megatron-LM would pad 384 but not 512.
        changes: Differences of the model's configuration from that of its family.
        flags: More flags of Megatron-LM. The uninterrupted run doesn't have them.
        megatron_core: The versions that the row works with.
        limit_s: The most seconds that it may take, including shared parts that it makes first.
    """

    model: str
    layout: Layout
    other: Layout | None = ONE
    default: bool = False
    sharded: bool = False
    packed: bool = False
    primus: bool = False
    local: bool = False
    vocab_size: int = models.VOCAB_SIZE
    changes: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    megatron_core: str = ""
    limit_s: float = 600

    typical_s: ClassVar[float] = 90

    @property
    def name(self) -> str:
        """The name on the command line, such as `llama-3-tp2-pp2`."""
        words = self.layout.name.replace("×", " ").replace(",", " ").lower().split()
        size = [] if self.vocab_size == models.VOCAB_SIZE else [f"vocab-{self.vocab_size}"]
        kind = [kind for kind in ("packed", "primus", "local") if getattr(self, kind)]
        return "-".join([self.model, *size, *words, *kind])

    @property
    def parallelism(self) -> str:
        """The layout and the layout of the second resume, for the report."""
        return f"{self.layout.name}, then {self.other.name}" if self.other else self.layout.name

    def why_not(self, runner: "Runner") -> str | None:
        """Return why it can't run here, or None if it can."""
        return runner.why_not(self, self.layout)

    def fitted(self, runner: "Runner") -> tuple["Row", str]:
        """Return the part of the row that can run here, and a note for the report about the rest."""
        without = self.other and runner.why_not(self, self.other)
        if not without:
            return self, ""
        return replace(self, other=None), f"not resumed with {self.other.name}: {without}"

    def run(self, runner: "Runner") -> "RowRun":
        """Return the run of this row."""
        return PrimusRun(runner, self) if self.primus else RowRun(runner, self)


@dataclass(frozen=True)
class Check:
    """A row without fine-tuning: a conversion, a comparison, or a command. Subclasses define `run`.

    Attributes:
        name: The name on the command line.
        model: The model that it converts, loads, or asks about.
        limit_s: The most seconds that it may take.
    """

    name: str
    model: str
    limit_s: float = 300

    typical_s: ClassVar[float] = 20
    parallelism: ClassVar[str] = "1 rank"

    def why_not(self, runner: "Runner") -> str | None:
        """Return why it can't run here, or None if it can."""
        return None

    def fitted(self, runner: "Runner") -> tuple["Check", str]:
        """Return the part of the row that can run here, which is all of it."""
        return self, ""

    def run(self, runner: "Runner") -> "Run":
        """Return the run of this row."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define run()")


# Megatron-LM can't resume an optimizer as another kind: a distributed one stays distributed, and expert parallelism
# has a separate optimizer for the experts. So `other` changes only the rest.
# The default rows cover every layout and every family once. Rows with few ranks come first: they find the most in the
# least time.
ROWS = (
    Row("llama-3", ONE, other=TP2, default=True),
    Row("llama-3", TP2, default=True, sharded=True),
    Row("llama-3.1", PP2, default=True, sharded=True),
    Row("llama-3", DP2, default=True),
    Row("llama-3.2", TP2_SP, vocab_size=512, default=True),
    Row("llama-3.2", PP2_INTERLEAVED, vocab_size=512, default=True),
    Row("qwen3-moe", EP2, other=TP2_EP2, default=True, sharded=True),
    Row("llama-3", DP2_OPTIMIZER, other=ONE_OPTIMIZER, default=True),
    Row("llama-3.1", TP2_PP2, default=True),
    Row("llama-3", TP2_DP2, default=True),
    Row("llama-3", ONE, other=TP2_SP, packed=True, default=True, megatron_core=">=0.19"),
    Row("llama-3", ONE, other=None, primus=True, default=True),
    Row("llama-3", PP2, other=DP2, sharded=True),
    Row("llama-3", TP2_SP, other=PP2, sharded=True),
    Row("llama-3", PP2_INTERLEAVED, other=TP2, sharded=True),
    Row("llama-3", TP2_PP2, other=TP2_DP2, sharded=True),
    Row("llama-3", TP2, vocab_size=512),
    Row("llama-3", TP2, vocab_size=390),
    Row("llama-3.1", ONE, other=PP2),
    Row("llama-3.1", TP2, other=DP2, sharded=True),
    Row("llama-3.1", DP2_OPTIMIZER, other=ONE_OPTIMIZER),
    Row("llama-3.1", TP2_DP2, other=TP2_PP2),
    Row("llama-3.2", ONE, other=PP2),
    Row("llama-3.2", TP2, other=PP2, sharded=True),
    Row("llama-3.2", PP2, other=TP2, sharded=True),
    Row("llama-3.2", DP2, other=TP2),
    Row("llama-3.2", TP2_PP2, sharded=True),
    Row("qwen3-moe", ONE, other=PP2),
    Row("qwen3-moe", TP2_SP, sharded=True),
    Row("qwen3-moe", PP2, sharded=True),
    Row("qwen3-moe", DP2, other=PP2),
    Row("qwen3-moe", DP2_OPTIMIZER, other=ONE_OPTIMIZER),
    Row("llama-3", TP4, other=TP2_DP2, sharded=True, changes=WIDE),
    Row("llama-3", TP8, other=TP4_PP2, sharded=True, changes=WIDE),
    Row("llama-3", TP4_PP2, other=TP8, sharded=True, changes=WIDE),
)


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that is allowed between two losses that should be equal, in nats.

    Attributes:
        implementation: Between Hugging Face and Megatron-LM, with the same weights and tokens.
        resumed: Between an interrupted and an uninterrupted run, with the same layout.
        layout: Between different layouts after some iterations, because they add in different orders.
    """

    implementation: float
    resumed: float
    layout: float


# float32 on the CPU, bf16 on GPUs.
TOLERANCES = {
    "cpu": Tolerance(1e-4, 2e-6, 1e-4),
    "cuda": Tolerance(3e-2, 1e-2, 5e-2),
    "rocm": Tolerance(3e-2, 1e-2, 5e-2),
}


class StageFailed(Exception):
    """A stage of a row failed."""

    def __init__(self, row: Row | Check, stage: str, reason: str, log: Path) -> None:
        super().__init__(f"row {row.name} failed at stage “{stage}”: {reason}")
        self.log = log


class Stopped(BaseException):
    """A signal ended the row. It is a BaseException, so that no stage reports it as its own failure."""


def family_flags(row: Row) -> tuple[str, ...]:
    """Return the flags of every run of the row's family."""
    return FAMILY_FLAGS.get(row.model, ())


def expect(found: Any, expected: Any, what: str) -> None:
    """Compare exactly."""
    if found != expected:
        raise AssertionError(f"{what}: found {found!r}, expected {expected!r}")


def expect_close(found: Mapping[int, float], expected: Mapping[int, float], tolerance: float, what: str) -> None:
    """Compare losses at the iterations that the first mapping has."""
    apart = {i: abs(found[i] - expected.get(i, math.nan)) for i in found}
    worst = max(apart, key=lambda i: math.inf if math.isnan(apart[i]) else apart[i], default=None)
    if worst is None or not apart[worst] <= tolerance:
        raise AssertionError(
            f"{what}: differ by {apart.get(worst)} at iteration {worst}, expected at most {tolerance};"
            f" found {dict(found)}, expected {dict(expected)}"
        )


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the time is over, even while it waits."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Importer = Callable[[Path, Path], None]


def import_release(source: Path, target: Path) -> None:
    """Import a model as a user does."""
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(source, target)


class Runner:
    """Runs rows on one platform. Models, imports, and uninterrupted runs are made once, and shared by the rows.

    Args:
        host: The host.
        folder: The folder for models and checkpoints.
        logs: The folder for the logs, losses, and batches of each row.
        importer: Converts a Hugging Face model to a Megatron checkpoint.
    """

    def __init__(self, host: Host, folder: Path, logs: Path, importer: Importer = import_release) -> None:
        self.host = host
        self.folder = folder
        self.logs = logs
        self.importer = importer
        self.tolerance = TOLERANCES[host.platform.name]
        self._kept: dict[Any, Any] = {}

    def run(self, row: Row | Check) -> Result:
        """Run a row to its end, or to the first stage that fails.

        Returns:
            The result. It reports a failure, a stop, or a row that doesn't fit; nothing is raised.
        """
        reason = row.why_not(self)
        outcome = Outcome.LEFT_OUT if reason else Outcome.PASSED
        if not reason:
            row, reason = row.fitted(self)
        run = row.run(self)
        started, log = time.time(), run.logs
        if outcome is Outcome.PASSED:
            try:
                run.go()
                if run.shows_nothing:
                    outcome, reason = Outcome.LEFT_OUT, run.shows_nothing
            except StageFailed as failed:
                outcome, reason, log = Outcome.FAILED, str(failed), failed.log
            except Stopped as stopped:
                outcome, reason = Outcome.LEFT_OUT, f"stopped by {stopped} at stage “{run.at}”"
        return Result(
            row.name,
            self.host.platform.name,
            row.parallelism,
            row.model,
            outcome,
            reason or "",
            time.time() - started,
            {**self.host.versions, **run.versions},
            self.command(row),
            str(log),
            run.curves,
            run.figures,
        )

    def why_not(self, row: Row, layout: Layout) -> str | None:
        """Return why a row can't run with a layout here, or None if it can."""
        if why := self.host.why_not(layout.ranks):
            return why
        if row.primus and primus.checkout() is None:
            return "needs a checkout of AMD-AGI/Primus: --primus DIR"
        # With the emulation of CUDA, Megatron Core's own layers do both. On a device they refuse (core 0.19.2,
        # `megatron/core/transformer/torch_norm.py` and `dot_product_attention.py`).
        if (layout.sequence_parallel or row.packed) and self.host.lacks_transformer_engine:
            what = "sequence parallelism" if layout.sequence_parallel else "packed sequences"
            return f"needs Transformer Engine for {what}, which can't be imported here"
        if not SpecifierSet(row.megatron_core).contains(CORE, prereleases=True):
            return f"needs megatron-core {row.megatron_core}, and {CORE} is installed"
        return None

    def command(self, row: Row | Check) -> str:
        """Return the command that runs this row alone."""
        session = f'python3 -m nox -s "functional({self.host.platform.name})" --'
        return f"{os.environ.get(COMMAND_VARIABLE, session)} --row {row.name}"

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Make something once. After a failure, every row that needs it fails with the same error."""
        if key not in self._kept:
            try:
                self._kept[key] = make()
            except TimeoutError:  # the next row has its own time
                raise
            except Exception as error:
                self._kept[key] = error
        if isinstance(self._kept[key], Exception):
            raise self._kept[key]
        return self._kept[key]

    def key(self, row: Row) -> str:
        """Return the name of a row's model."""
        return f"{row.model}-{row.vocab_size}{'-wide' if row.changes else ''}"

    def packed(self, row: Row) -> bool:
        """Return whether a sequence of the row holds several conversations, as `pretrain_gpt.py --sft` always does.

        Primus's row has one conversation per sequence, so that any Megatron-LM can train from what its hook leaves.
        """
        if row.primus:
            return False
        # Before core 0.19, a micro-batch can't hold several packed sequences: `finetune.py`, `pack`.
        with_te = self.host.transformer_engine is not None and CORE in SpecifierSet(">=0.19", prereleases=True)
        return row.packed or bool(steps.megatron_lm()) or (with_te and not row.local)

    def local(self, row: Row) -> bool:
        """Return whether a row has other layers than the host's other rows."""
        return row.local and self.host.transformer_engine is not None

    def layer_flags(self, row: Row) -> list[str]:
        """Return the flags for the row's layers."""
        return self.host.local_flags() if row.local else []

    def sft_flags(self, row: Row) -> list[str]:
        """Return the flags for packed conversations, if the row has them."""
        return steps.sft_flags() if self.packed(row) else []

    def source(self, row: Row) -> Path:
        """Make the Hugging Face model."""
        folder = self.folder / "hf" / self.key(row)
        changes = {"vocab_size": row.vocab_size, **row.changes}
        return self._once(("hf", folder), lambda: models.make_model(folder, row.model, **changes))

    def chats(self, row: Row) -> steps.Chats:
        """Write the conversations that every row trains on."""
        together = 2 if self.packed(row) else 1
        train, valid = (self.folder / "chats" / f"{split}-{together}.jsonl" for split in ("train", "valid"))

        def make() -> None:
            write_conversations(train, 128 * together, together=together)
            write_conversations(valid, 32 * together, seed=2, together=together)

        self._once(("chats", together), make)
        return steps.Chats(train, valid, self.source(row))

    def imported(self, row: Row) -> Path:
        """Import the model."""
        source, target = self.source(row), self.folder / "megatron" / self.key(row)

        def make() -> Path:
            self.importer(source, target)
            return target

        return self._once(("import", target), make)

    def uninterrupted(self, row: Row) -> steps.Training:
        """Train the row's model without interruption on one rank, with the whole command line and no checkpoint args.

        Every row with this model is compared with this run.
        """
        name = f"{self.key(row)}{'-packed' if self.packed(row) else ''}{'-local' if self.local(row) else ''}"
        folder = self.logs / "uninterrupted" / name

        def make() -> steps.Training:
            shutil.rmtree(folder, ignore_errors=True)
            return steps.train(
                f"{name}, uninterrupted",
                folder,
                self.chats(row),
                load=self.imported(row),
                save=self.folder / "uninterrupted" / name,
                iterations=WHOLE,
                megatron_lm=[] if row.primus else None,
                flags=[
                    *self.whole_command_line(self.imported(row)),
                    *family_flags(row),
                    *self.sft_flags(row),
                    *self.layer_flags(row),
                ],
            )

        return self._once(("uninterrupted", name), make)

    def whole_command_line(self, checkpoint: Path) -> list[str]:
        """Return the flags that describe a checkpoint's model without `--use-checkpoint-args`."""
        # Bridge's command line has the model's longest sequence. The last flag wins.
        length = [flag for flag in steps.TRAINING_FLAGS if flag.startswith("--seq-length")]
        return [*steps.model_flags(checkpoint, use_checkpoint_args=False), *length]


class Run:
    """One run of a row, in stages. A failure is reported with the name of its stage.

    Attributes:
        curves: Losses by iteration, for the report.
        figures: Other measurements.
        shows_nothing: The reason why a complete run doesn't count as passed but as left out.
        at: The current stage.
    """

    def __init__(self, runner: Runner, row: Row | Check) -> None:
        self.runner = runner
        self.row = row
        self.logs = runner.logs / "rows" / row.name
        self.root = runner.folder / "rows" / row.name
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.figures: dict[str, float] = {}
        self.versions: dict[str, str] = {}
        self.shows_nothing = ""
        self.at = "start"

    def go(self) -> None:
        """Run every stage within the row's time limit.

        Raises:
            StageFailed: The first stage that failed.
        """
        for folder in (self.logs, self.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with time_limit(self.row.limit_s):
            self.go_on()
        shutil.rmtree(self.root)

    def go_on(self) -> None:
        """Run every stage."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report every error with the name of the stage."""
        self.at = name
        try:
            yield
        except steps.StepFailed as error:
            raise StageFailed(self.row, self.blamed(name), str(error), error.log) from error
        except Exception as error:
            log = self.logs / f"{name.replace(' ', '-')}-failed.txt"
            log.write_text(traceback.format_exc())
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise StageFailed(self.row, name, f"{kind}{error}", log) from error

    def blamed(self, stage: str) -> str:
        """Return the stage that is reported for a step that failed in `stage`."""
        return stage


class RowRun(Run):
    """One run of a row with fine-tuning. Each stage is a method."""

    row: Row

    def go_on(self) -> None:
        """Run every stage."""
        with self.stage("import"):
            start = self.import_model()
        with self.stage("load"):
            flags = self.flags(start)
            fine_tuned = self.fine_tune(start, flags)
        with self.stage("uninterrupted run"):
            self.whole = self.runner.uninterrupted(self.row)
            self.keep(UNINTERRUPTED, self.whole)
        with self.stage("fine-tune"):
            self.judge_fine_tuning(fine_tuned)
        with self.stage("second import"):
            self.import_again()
        if other := self.row.other:
            with self.stage(f"resume with {other.name}"):
                self.resume_otherwise(other, flags)
        with self.stage("resume"):
            resumed = self.resume(flags)
        with self.stage("export"):
            exported = self.export()
        with self.stage("judge the export"):
            self.judge_export(exported, resumed)

    def blamed(self, stage: str) -> str:
        """Return the stage that is reported for a step that failed in `stage`."""
        # If training started, the checkpoint was loaded, and the error is not its fault.
        return "fine-tune" if stage == "load" and (self.logs / FINE_TUNE / "losses.jsonl").exists() else stage

    def keep(self, name: str, training: steps.Training) -> None:
        """Save a curve for the report."""
        self.curves[name] = sorted(training.losses().items())

    @property
    def layers(self) -> int:
        """The number of layers of the model."""
        return models.FAMILIES[self.row.model].configuration(**self.row.changes).num_hidden_layers

    def train(self, name: str, layout: Layout, load: Path, save: Path, flags: list[str]) -> steps.Training:
        """Train with Megatron-LM to the row's last iteration, or as far as `flags` say."""
        return steps.train(
            f"{self.row.name}, {name}",
            self.logs / name,
            self.runner.chats(self.row),
            load=load,
            save=save,
            iterations=WHOLE,
            flags=[
                *flags,
                *family_flags(self.row),
                *self.runner.sft_flags(self.row),
                *self.runner.layer_flags(self.row),
                *layout.flags(self.layers),
                *self.row.flags,
            ],
            ranks=layout.ranks,
            limit_s=self.row.limit_s,
        )

    def import_model(self) -> Path:
        """Put a release checkpoint where the training starts: of an import, or of a save by a model on all ranks."""
        imported = self.runner.imported(self.row)
        if not self.row.sharded:
            return Path(shutil.copytree(imported, self.root / "run"))
        layout, log = self.row.layout, self.logs / "import" / "log.txt"
        arguments = [
            *(f"--{name}={getattr(layout, name)}" for name in ("tp", "pp", "ep")),
            *(["--interleaved"] if layout.interleaved else []),
            f"--backend={self.runner.host.platform.backend}",
            str(self.runner.source(self.row)),
            str(self.root / "run"),
        ]
        command = [*steps.launch(steps.HERE / "save_sharded.py", layout.ranks), *arguments]
        steps.Step(f"{self.row.name}, release checkpoint from a model on {layout.ranks} ranks", command, log).run()
        tensors = (dict(steps.model_tensors(root / "release")) for root in (imported, self.root / "run"))
        expect(differences(*tensors), [], "weights that differ from import_ckpt's")
        return self.root / "run"

    def flags(self, start: Path) -> list[str]:
        """Return the flags that Megatron-LM needs besides the checkpoint. None of them may ask for leniency."""
        try:
            flags = steps.model_flags(start)
        except (ImportError, ValueError):
            # The wheel or the checkpoint is without the change. Let Megatron-LM report what is wrong.
            return ["--use-checkpoint-args"]
        expect(flags[0], "--use-checkpoint-args", "the first flag")
        lenient = ("--finetune", "--no-load", "--num-layers", "--hidden-size")
        expect([flag for flag in flags if flag.startswith(lenient)], [], "flags that --use-checkpoint-args replaces")
        return flags

    def fine_tune(self, start: Path, flags: list[str]) -> steps.Training:
        """Load the release checkpoint with the row's layout, train halfway, and save beside it."""
        before = (steps.tracker(start), steps.payloads(start))
        training = self.train(FINE_TUNE, self.row.layout, start, start, [*flags, f"--exit-interval={HALF}"])
        self.keep(FINE_TUNE, training)
        log = training.log.read_text()
        for words in ("loading release distributed checkpoint", "Setting padded_vocab_size to"):
            expect(words in log, True, f"“{words}” in {training.log}")
        expect(before, ("release", ["release"]), "tracker and folders of the import")
        return training

    def judge_fine_tuning(self, training: steps.Training) -> None:
        """Compare the losses with Hugging Face and the uninterrupted run, and check which tokens carry loss."""
        losses, batches = training.losses(), training.batches(1)
        expect(list(losses), list(range(1, HALF + 1)), "iterations")
        chats = self.runner.chats(self.row)
        expect(chats.said_by_others(batches), [], "texts with loss that are not answers of the assistant")
        reference = hf_loss(self.runner.source(self.row), batches, device=self.runner.host.accelerator)
        self.curves[HUGGING_FACE] = [(1, reference)]
        expect_close(
            {1: losses[1]}, {1: reference}, self.runner.tolerance.implementation, "first loss, and Hugging Face's"
        )
        self.compare(training, self.row.layout, "losses of fine-tuning and of the uninterrupted run")
        expect(steps.tracker(training.checkpoint), str(HALF), "tracker after fine-tuning")
        expect(steps.payloads(training.checkpoint), [SAVED, "release"], "folders after fine-tuning")

    def compare(self, training: steps.Training, layout: Layout, what: str) -> None:
        """Compare losses with those of the uninterrupted run, which had one rank."""
        tolerance = self.runner.tolerance.resumed if layout == ONE == self.row.layout else self.runner.tolerance.layout
        expect_close(training.losses(), self.whole.losses(), tolerance, what)

    def import_again(self) -> None:
        """Check that an import into a folder with training iterations is refused and changes nothing."""
        run = self.root / "run"
        try:
            self.runner.importer(self.runner.source(self.row), run)
        except FileExistsError:
            found = (steps.tracker(run), steps.payloads(run))
            expect(found, (str(HALF), [SAVED, "release"]), "tracker and folders after the refusal")
        else:
            raise AssertionError("found an import beside training iterations that succeeded, expected FileExistsError")

    def resume_otherwise(self, other: Layout, flags: list[str]) -> None:
        """Resume from the save in a new process, with another layout."""
        save = self.root / "other"
        training = self.train("resume-otherwise", other, self.root / "run", save, flags)
        self.keep(f"{RESUMED} with {other.name}", training)
        self.judge_resume(training, other)
        expect(steps.payloads(save), [FINISHED], "folders after resuming")

    def resume(self, flags: list[str]) -> steps.Training:
        """Resume from the save in a new process, with the same layout."""
        run = self.root / "run"
        training = self.train("resume", self.row.layout, run, run, flags)
        self.keep(RESUMED, training)
        self.judge_resume(training, self.row.layout)
        expect(steps.payloads(run), [SAVED, FINISHED, "release"], "folders after resuming")
        return training

    def judge_resume(self, training: steps.Training, layout: Layout) -> None:
        """Check iterations and losses. Wrong optimizer state, data, or learning rate would bend the curve."""
        expect(list(training.losses()), list(range(HALF + 1, WHOLE + 1)), "iterations")
        self.compare(training, layout, "losses after the resume")
        fall = self.whole.losses()[1] - training.losses()[WHOLE]
        expect(fall > LEAST_FALL, True, f"whether the loss fell by more than {LEAST_FALL} (it fell by {fall})")
        expect(steps.tracker(training.checkpoint), str(WHOLE), "tracker after resuming")

    def export(self) -> Path:
        """Export the last checkpoint that Megatron-LM saved."""
        from megatron.bridge import AutoBridge

        bridge = AutoBridge.from_hf_pretrained(self.runner.source(self.row))
        bridge.export_ckpt(self.root / "run", self.root / "exported", show_progress=False)
        return self.root / "exported"

    def judge_export(self, exported: Path, resumed: steps.Training) -> None:
        """Check that Hugging Face's loss on held-out conversations is the one that Megatron-LM ended with."""
        packed = self.runner.packed(self.row)
        held_out, device = resumed.batches(WHOLE, "valid"), self.runner.host.accelerator
        found = hf_loss(exported, held_out, by_batch=packed, device=device)
        expected, tolerance = resumed.losses("valid"), self.runner.tolerance.implementation
        expect_close({WHOLE: found}, expected, tolerance, "held-out loss of Hugging Face and of Megatron-LM")
        moved = differences(Tensors(self.runner.source(self.row)), Tensors(exported))
        expect(len(moved) > 0, True, "whether training changed the weights")


class PrimusRun(RowRun):
    """One run of a row whose release checkpoint the hook of Primus imports, and which trains as Primus does.

    With `--megatron-lm`, the Megatron-LM of that checkout trains, with its own Megatron Core. Otherwise the wheel's
    trains. Both must have the losses of the wheel's Megatron-LM from the release checkpoint of `import_ckpt`.
    """

    def go_on(self) -> None:
        """Run every stage."""
        with self.stage("hook"):
            extras = self.convert("hook")
        with self.stage("load"):
            trained = self.fine_tune_as_primus(extras)
        with self.stage("uninterrupted run"):
            self.whole = self.runner.uninterrupted(self.row)
            self.keep(UNINTERRUPTED, self.whole)
        with self.stage("fine-tune"):
            self.judge(trained)
        with self.stage("second hook"):
            self.convert_again(extras)

    def convert(self, name: str) -> dict[str, str]:
        """Run the hook, and check that it leaves a release checkpoint and names it."""
        log = self.logs / name / "log.txt"
        source, checkout = self.runner.source(self.row), primus.checkout()
        extras = primus.convert(f"{self.row.name}, {name}", checkout, source, self.root / "primus", log)
        expect(sorted(extras), ["finetune", "pretrained_checkpoint"], f"arguments that the hook adds, in {log}")
        expect(extras["finetune"], "true", f"extra.finetune in {log}")
        start = Path(extras["pretrained_checkpoint"])
        found = (steps.tracker(start), steps.payloads(start))
        expect(found, ("release", ["release"]), "tracker and folders that the hook leaves")
        return extras

    def fine_tune_as_primus(self, extras: dict[str, str]) -> steps.Training:
        """Train to the end from what the hook names, without `--load`, with flags that describe the model."""
        start = Path(extras["pretrained_checkpoint"])
        training = steps.train(
            f"{self.row.name}, {FINE_TUNE}",
            self.logs / FINE_TUNE,
            self.runner.chats(self.row),
            load=None,
            save=self.root / "run",
            iterations=WHOLE,
            megatron_lm=steps.packages_of_checkout(),
            flags=[
                f"--pretrained-checkpoint={start}",
                "--finetune",
                *self.runner.whole_command_line(start),
                *family_flags(self.row),
                *self.row.layout.flags(self.layers),
                *self.row.flags,
            ],
            ranks=self.row.layout.ranks,
            limit_s=self.row.limit_s,
        )
        self.keep(FINE_TUNE, training)
        return training

    def judge(self, training: steps.Training) -> None:
        """Check that the requested Megatron-LM loaded the hook's release checkpoint, and that its losses are right."""
        log = training.log.read_text()
        expect("loading release distributed checkpoint" in log, True, f"load of a release in {training.log}")
        version, folder = re.search(r"^Megatron Core (\S+) of (.+)$", log, re.M).groups()
        if checkout := steps.megatron_lm():
            expect(Path(folder), checkout, f"where Megatron Core {version} was imported from")
            self.versions["megatron-core of --megatron-lm"] = version
        expect(list(training.losses()), list(range(1, WHOLE + 1)), "iterations")
        self.compare(training, self.row.layout, "losses from the release checkpoints of the hook and of import_ckpt")
        found = (steps.tracker(training.checkpoint), steps.payloads(training.checkpoint))
        expect(found, (str(WHOLE), [FINISHED]), "tracker and folders after fine-tuning")

    def convert_again(self, extras: dict[str, str]) -> None:
        """Check that a second start of Primus finds the checkpoint and doesn't change it."""
        before = self.files()
        expect(self.convert("second-hook"), extras, "arguments that the hook adds the second time")
        expect(self.files(), before, "files of the checkpoint after the second time")

    def files(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time of each file that the hook left."""
        stats = {path: path.stat() for path in (self.root / "primus" / "data").rglob("*") if path.is_file()}
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def rows(names: list[str] | None = None, everything: bool = False) -> list[Row]:
    """Return the chosen rows. Default: the default set.

    Args:
        names: Return only these.
        everything: Return every row.

    Raises:
        ValueError: No row has this name.
    """
    by_name = {row.name: row for row in ROWS}
    if unknown := [name for name in names or [] if name not in by_name]:
        raise ValueError(f"no row is named {unknown[0]!r}; choose from {', '.join(by_name)}")
    if names:
        return [by_name[name] for name in names]
    return [row for row in ROWS if everything or row.default]


if __name__ == "__main__":
    for row in ROWS:
        sys.stdout.write(f"{row.name:40} {row.parallelism:50} {'default' if row.default else '--all'}\n")
