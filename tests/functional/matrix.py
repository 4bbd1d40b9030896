# SPDX-License-Identifier: Apache-2.0
"""The functional matrix: each row goes from Hugging Face to Megatron-LM and back under one way to use several ranks.

`ROWS` says what runs, `Runner` how. `test_matrix.py` gives each row to pytest; `nox -s functional` runs the default
set, `nox -s functional -- --all` every row, `nox -s functional -- --row NAME` one.
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


HALF, WHOLE = 3, 6  # iterations until the save, and in all
LEAST_FALL = 1.0  # nats: the conversations follow rules, and a model that learns gets far below its first loss
SAVED, FINISHED = f"iter_{HALF:07d}", f"iter_{WHOLE:07d}"
CORE = metadata.version("megatron-core")
COMMAND_VARIABLE = "FUNCTIONAL_COMMAND"  # the session of nox that this is, with the options that are its own


@dataclass(frozen=True)
class Layout:
    """A way to use several ranks.

    Attributes:
        name: What the report calls it.
        ranks: How many.
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        ep: Expert parallel size.
        interleaved: Two groups of layers on each pipeline stage.
        sequence_parallel: Activations between tensor parallel regions are cut along the sequence.
        distributed_optimizer: The optimizer's state is cut over data parallel ranks.
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
        """Give Megatron-LM's flags for it.

        Args:
            layers: Layers of the model.
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

# The loss that balances experts depends on which tokens a rank sees together, so it pulls layouts apart; "lm loss"
# doesn't hold it, and without it they train alike to the last digit.
FAMILY_FLAGS = {"qwen3-moe": ("--moe-aux-loss-coeff=0",)}

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}  # enough heads for eight ranks


@dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Attributes:
        model: The family, a key of `models.FAMILIES`.
        layout: How it is fine-tuned and resumed.
        other: How it is resumed a second time; None for a host that has too little for that.
        default: It belongs to the set that runs without `--all`.
        sharded: It starts from a release that a model on all of the row's ranks saved, not from `import_ckpt`'s.
        packed: Several conversations a sequence, with `--sft`; with Transformer Engine all but Primus's do, and local
            ones.
        primus: The hook of a checkout of Primus imports it; see `PrimusRun`.
        local: Megatron Core's own layers, where Transformer Engine is, too.
        vocab_size: Tokens of the model. Megatron-LM would pad 384 with two tensor parallel ranks, and 512 not.
        changes: What sets the model's configuration apart from its family's.
        flags: More of Megatron-LM's flags; the uninterrupted run that it is compared with doesn't have them.
        megatron_core: Versions that it works with.
        limit_s: Seconds that it may take, with what it is the first to make for others.
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
        """What the report says: the layout, and the one that it is resumed with."""
        return f"{self.layout.name}, then {self.other.name}" if self.other else self.layout.name

    def why_not(self, runner: "Runner") -> str | None:
        """Say why it can't run here, or give None if it can."""
        return runner.why_not(self, self.layout)

    def fitted(self, runner: "Runner") -> tuple["Row", str]:
        """Give what of it can run here, and what the report says about the rest."""
        without = self.other and runner.why_not(self, self.other)
        if not without:
            return self, ""
        return replace(self, other=None), f"not resumed with {self.other.name}: {without}"

    def run(self, runner: "Runner") -> "RowRun":
        """Give what runs it."""
        return PrimusRun(runner, self) if self.primus else RowRun(runner, self)


@dataclass(frozen=True)
class Check:
    """A row that fine-tunes nothing: a conversion, a comparison, a command. What it does is `run`'s to say.

    Attributes:
        name: The name on the command line.
        model: What it converts, loads or asks.
        limit_s: Seconds that it may take.
    """

    name: str
    model: str
    limit_s: float = 300

    typical_s: ClassVar[float] = 20
    parallelism: ClassVar[str] = "1 rank"

    def why_not(self, runner: "Runner") -> str | None:
        """Say why it can't run here, or give None if it can."""
        return None

    def fitted(self, runner: "Runner") -> tuple["Check", str]:
        """Give what of it can run here: all."""
        return self, ""

    def run(self, runner: "Runner") -> "Run":
        """Give what runs it."""
        raise NotImplementedError(f"{type(self).__name__} doesn't say what runs it")


# Megatron-LM resumes no optimizer of another kind: a distributed one stays distributed, and with expert parallelism
# the experts have one of their own. So `other` changes the rest.
# Those with `default` cover every layout and every family once. Two ranks first: they find most for least time.
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
    """How far two losses that should be equal may lie apart, in nats.

    Attributes:
        implementation: Hugging Face's and Megatron-LM's, on the same weights and tokens.
        resumed: Of a run that was interrupted and one that was not, under the same layout.
        layout: After some iterations under different layouts, whose sums have different orders.
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
    """A stage of a row didn't do what it should."""

    def __init__(self, row: Row | Check, stage: str, reason: str, log: Path) -> None:
        super().__init__(f"row {row.name} failed at stage “{stage}”: {reason}")
        self.log = log


class Stopped(BaseException):
    """Somebody wants the row that runs to end now. No stage takes this for its own failure."""


def family_flags(row: Row) -> tuple[str, ...]:
    """Give the flags that every run of the row's family has."""
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
            f"{what}: apart by {apart.get(worst)} at iteration {worst}, expected at most {tolerance};"
            f" found {dict(found)}, expected {dict(expected)}"
        )


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the time is over, whatever it waits for."""

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
    """Import as a user does."""
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(source, target)


class Runner:
    """Runs rows on one platform. What rows have in common (models, imports, uninterrupted runs) is made once.

    Args:
        host: What was found.
        folder: Where models and checkpoints go.
        logs: Where each row's logs, losses and batches go.
        importer: What makes a Megatron checkpoint of a Hugging Face one.
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
            What came of it; that a row failed, was stopped or doesn't fit is said there and not raised.
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
        """Say why a row can't run with a layout here, or give None if it can."""
        if why := self.host.why_not(layout.ranks):
            return why
        if row.primus and primus.checkout() is None:
            return "needs a checkout of AMD-AGI/Primus: --primus DIR"
        # The emulation of CUDA lets Megatron Core's own layers do both; on a device they refuse (core 0.19.2,
        # `megatron/core/transformer/torch_norm.py` and `dot_product_attention.py`).
        if (layout.sequence_parallel or row.packed) and self.host.lacks_transformer_engine:
            what = "sequence parallelism" if layout.sequence_parallel else "packed sequences"
            return f"needs Transformer Engine for {what}, which can't be imported here"
        if not SpecifierSet(row.megatron_core).contains(CORE, prereleases=True):
            return f"needs megatron-core {row.megatron_core}, and {CORE} is installed"
        return None

    def command(self, row: Row | Check) -> str:
        """Give what runs this row alone."""
        session = f'python3 -m nox -s "functional({self.host.platform.name})" --'
        return f"{os.environ.get(COMMAND_VARIABLE, session)} --row {row.name}"

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Make something once. What failed is not tried again: each row that needs it fails with the same words."""
        if key not in self._kept:
            try:
                self._kept[key] = make()
            except TimeoutError:  # of this row, and not what the next one would meet
                raise
            except Exception as error:
                self._kept[key] = error
        if isinstance(self._kept[key], Exception):
            raise self._kept[key]
        return self._kept[key]

    def key(self, row: Row) -> str:
        """Name the model of a row."""
        return f"{row.model}-{row.vocab_size}{'-wide' if row.changes else ''}"

    def packed(self, row: Row) -> bool:
        """Whether a row's sequences hold several conversations: `pretrain_gpt.py --sft` makes no others.

        Primus's row has one in each, so that any Megatron-LM can train from what its hook leaves.
        """
        if row.primus:
            return False
        # Before core 0.19 several packed sequences can't be one micro-batch: `finetune.py`, `pack`.
        with_te = self.host.transformer_engine is not None and CORE in SpecifierSet(">=0.19", prereleases=True)
        return row.packed or bool(steps.megatron_lm()) or (with_te and not row.local)

    def local(self, row: Row) -> bool:
        """Whether a row has other layers than the host's other rows."""
        return row.local and self.host.transformer_engine is not None

    def layer_flags(self, row: Row) -> list[str]:
        """Give the flags that say so."""
        return self.host.local_flags() if row.local else []

    def sft_flags(self, row: Row) -> list[str]:
        """Give the flags that say so."""
        return steps.sft_flags() if self.packed(row) else []

    def source(self, row: Row) -> Path:
        """Make the model in Hugging Face's form."""
        folder = self.folder / "hf" / self.key(row)
        changes = {"vocab_size": row.vocab_size, **row.changes}
        return self._once(("hf", folder), lambda: models.make_model(folder, row.model, **changes))

    def chats(self, row: Row) -> steps.Chats:
        """Write the conversations that every row is trained on."""
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
        """Train the row's model in one go on one rank, with the whole command line and none of it from the checkpoint.

        Every row with this model is compared with it.
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
        """Give the flags that describe a checkpoint's model, none of it read from the checkpoint."""
        # Bridge's command line gives the longest sequence of the model; the last word is ours.
        length = [flag for flag in steps.TRAINING_FLAGS if flag.startswith("--seq-length")]
        return [*steps.model_flags(checkpoint, use_checkpoint_args=False), *length]


class Run:
    """A row on its way, in stages; the name of a stage is what a failure is reported under.

    Attributes:
        curves: Losses by iteration, for the report.
        figures: What else was measured.
        shows_nothing: Why a run to the end is no pass; the row counts as left out then.
        at: The stage that it is at.
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
        """Go through every stage.

        Raises:
            StageFailed: the first that failed.
        """
        for folder in (self.logs, self.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with time_limit(self.row.limit_s):
            self.go_on()
        shutil.rmtree(self.root)

    def go_on(self) -> None:
        """Go through every stage, however long it takes."""
        raise NotImplementedError(f"{type(self).__name__} has no stages")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say of whatever goes wrong in which stage it did."""
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
        """Name what a step that failed in a stage is reported under."""
        return stage


class RowRun(Run):
    """One row of fine-tuning on its way. Each stage is a method."""

    row: Row

    def go_on(self) -> None:
        """Go through every stage, however long it takes."""
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
        """Name what a step that failed in a stage is reported under."""
        # What is loaded and then goes wrong is no fault of the checkpoint.
        return "fine-tune" if stage == "load" and (self.logs / FINE_TUNE / "losses.jsonl").exists() else stage

    def keep(self, name: str, training: steps.Training) -> None:
        """Keep a curve for the report."""
        self.curves[name] = sorted(training.losses().items())

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return models.FAMILIES[self.row.model].configuration(**self.row.changes).num_hidden_layers

    def train(self, name: str, layout: Layout, load: Path, save: Path, flags: list[str]) -> steps.Training:
        """Train with Megatron-LM as far as the row goes, or as `flags` say."""
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
        """Import; rows that say so save a release from a model on all ranks. Leave either where training goes on."""
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
        steps.Step(f"{self.row.name}, release from a model on {layout.ranks} ranks", command, log).run()
        tensors = (dict(steps.model_tensors(root / "release")) for root in (imported, self.root / "run"))
        expect(differences(*tensors), [], "weights of import_ckpt's release and of the sharded model's")
        return self.root / "run"

    def flags(self, start: Path) -> list[str]:
        """Ask Bridge for what Megatron-LM needs beside the checkpoint; none of it may ask for leniency."""
        try:
            flags = steps.model_flags(start)
        except (ImportError, KeyError):
            # A wheel or a checkpoint without the change. What is wrong with it is for Megatron-LM to say.
            return ["--use-checkpoint-args"]
        expect(flags[0], "--use-checkpoint-args", "the first flag")
        lenient = ("--finetune", "--no-load", "--num-layers", "--hidden-size")
        expect([flag for flag in flags if flag.startswith(lenient)], [], "flags that the checkpoint should answer")
        return flags

    def fine_tune(self, start: Path, flags: list[str]) -> steps.Training:
        """Load the release with the row's layout, train half way, save beside it."""
        before = (steps.tracker(start), steps.payloads(start))
        training = self.train(FINE_TUNE, self.row.layout, start, start, [*flags, f"--exit-interval={HALF}"])
        self.keep(FINE_TUNE, training)
        log = training.log.read_text()
        for words in ("loading release distributed checkpoint", "Setting padded_vocab_size to"):
            expect(words in log, True, f"“{words}” in {training.log}")
        expect(before, ("release", ["release"]), "tracker and folders of the import")
        return training

    def judge_fine_tuning(self, training: steps.Training) -> None:
        """First loss as Hugging Face's; the rest as the uninterrupted run's; loss on the assistant's tokens alone."""
        losses, batches = training.losses(), training.batches(1)
        expect(list(losses), list(range(1, HALF + 1)), "iterations")
        chats = self.runner.chats(self.row)
        expect(chats.said_by_others(batches), [], "texts with loss that are no answers of the conversations")
        reference = hf_loss(self.runner.source(self.row), batches, device=self.runner.host.accelerator)
        self.curves[HUGGING_FACE] = [(1, reference)]
        expect_close(
            {1: losses[1]}, {1: reference}, self.runner.tolerance.implementation, "first loss, Hugging Face's"
        )
        self.compare(training, self.row.layout, "fine-tuning, and the uninterrupted run")
        expect(steps.tracker(training.checkpoint), str(HALF), "tracker after fine-tuning")
        expect(steps.payloads(training.checkpoint), [SAVED, "release"], "folders after fine-tuning")

    def compare(self, training: steps.Training, layout: Layout, what: str) -> None:
        """Hold losses against those of the uninterrupted run, which had one rank."""
        tolerance = self.runner.tolerance.resumed if layout == ONE == self.row.layout else self.runner.tolerance.layout
        expect_close(training.losses(), self.whole.losses(), tolerance, what)

    def import_again(self) -> None:
        """A second import into a folder with training iterations is refused, and changes nothing."""
        run = self.root / "run"
        try:
            self.runner.importer(self.runner.source(self.row), run)
        except FileExistsError:
            found = (steps.tracker(run), steps.payloads(run))
            expect(found, (str(HALF), [SAVED, "release"]), "tracker and folders after the refusal")
        else:
            raise AssertionError("a second import beside training iterations was not refused")

    def resume_otherwise(self, other: Layout, flags: list[str]) -> None:
        """Go on from the save in a new process, with another layout."""
        save = self.root / "other"
        training = self.train("resume-otherwise", other, self.root / "run", save, flags)
        self.keep(f"{RESUMED} with {other.name}", training)
        self.judge_resume(training, other)
        expect(steps.payloads(save), [FINISHED], "folders after resuming")

    def resume(self, flags: list[str]) -> steps.Training:
        """Go on from the save in a new process, with the same layout."""
        run = self.root / "run"
        training = self.train("resume", self.row.layout, run, run, flags)
        self.keep(RESUMED, training)
        self.judge_resume(training, self.row.layout)
        expect(steps.payloads(run), [SAVED, FINISHED, "release"], "folders after resuming")
        return training

    def judge_resume(self, training: steps.Training, layout: Layout) -> None:
        """The iterations go on, and so does the curve: other optimizer state, data or learning rate would bend it."""
        expect(list(training.losses()), list(range(HALF + 1, WHOLE + 1)), "iterations")
        self.compare(training, layout, "resumed, and the uninterrupted run")
        fall = self.whole.losses()[1] - training.losses()[WHOLE]
        expect(fall > LEAST_FALL, True, f"loss fell by {fall}, which is more than {LEAST_FALL}")
        expect(steps.tracker(training.checkpoint), str(WHOLE), "tracker after resuming")

    def export(self) -> Path:
        """Export what Megatron-LM saved last."""
        from megatron.bridge import AutoBridge

        bridge = AutoBridge.from_hf_pretrained(self.runner.source(self.row))
        bridge.export_ckpt(self.root / "run", self.root / "exported", show_progress=False)
        return self.root / "exported"

    def judge_export(self, exported: Path, resumed: steps.Training) -> None:
        """On conversations that nobody trained on, Hugging Face has the loss that Megatron-LM ended with."""
        packed = self.runner.packed(self.row)
        held_out, device = resumed.batches(WHOLE, "valid"), self.runner.host.accelerator
        found = hf_loss(exported, held_out, by_batch=packed, device=device)
        expected, tolerance = resumed.losses("valid"), self.runner.tolerance.implementation
        expect_close({WHOLE: found}, expected, tolerance, "held-out loss, Hugging Face's and Megatron-LM's")
        moved = differences(Tensors(self.runner.source(self.row)), Tensors(exported))
        expect(len(moved) > 0, True, "weights moved")


class PrimusRun(RowRun):
    """A row whose release the hook of Primus imports, and from which Megatron-LM trains as Primus has it do.

    With `--megatron-lm` that checkout's Megatron-LM trains, with its own Megatron Core; without, the wheel's. Either
    must have the losses that the wheel's has when it starts from `import_ckpt`'s release.
    """

    def go_on(self) -> None:
        """Go through every stage, however long it takes."""
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
        """Run the hook, and see that it leaves a release and says so."""
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
        """Train to the end from what the hook names, with no `--load`, and the model described by flags."""
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
        """The Megatron-LM that was asked for has loaded the hook's release, and its losses are the wheel's."""
        log = training.log.read_text()
        expect("loading release distributed checkpoint" in log, True, f"the load of a release in {training.log}")
        version, folder = re.search(r"^Megatron Core (\S+) of (.+)$", log, re.M).groups()
        if checkout := steps.megatron_lm():
            expect(Path(folder), checkout, f"where Megatron Core {version} was imported from")
            self.versions["megatron-core of --megatron-lm"] = version
        expect(list(training.losses()), list(range(1, WHOLE + 1)), "iterations")
        self.compare(training, self.row.layout, "from the hook's release, and from import_ckpt's")
        found = (steps.tracker(training.checkpoint), steps.payloads(training.checkpoint))
        expect(found, (str(WHOLE), [FINISHED]), "tracker and folders after fine-tuning")

    def convert_again(self, extras: dict[str, str]) -> None:
        """A second start of Primus finds the checkpoint, and leaves it as it is."""
        before = self.files()
        expect(self.convert("second-hook"), extras, "arguments that the hook adds the second time")
        expect(self.files(), before, "files of the checkpoint after the second time")

    def files(self) -> dict[str, tuple[int, int]]:
        """Give size and time of change of each file that the hook left."""
        stats = {path: path.stat() for path in (self.root / "primus" / "data").rglob("*") if path.is_file()}
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def rows(names: list[str] | None = None, everything: bool = False) -> list[Row]:
    """Choose rows.

    Args:
        names: These and no others.
        everything: Every row, and not only the default set.

    Raises:
        ValueError: there is no row of such a name.
    """
    by_name = {row.name: row for row in ROWS}
    if unknown := [name for name in names or [] if name not in by_name]:
        raise ValueError(f"no row is named {unknown[0]!r}; choose of {', '.join(by_name)}")
    if names:
        return [by_name[name] for name in names]
    return [row for row in ROWS if everything or row.default]


if __name__ == "__main__":
    for row in ROWS:
        sys.stdout.write(f"{row.name:40} {row.parallelism:50} {'default' if row.default else '--all'}\n")
