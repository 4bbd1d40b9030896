# SPDX-License-Identifier: Apache-2.0
"""A short visit to a machine with a GPU: rows in the order of their worth, within a time budget.

    python tests/functional/visit.py --minutes 10                     # what this machine has; results in out/visit
    python tests/functional/visit.py --platform cpu                   # the same, rehearsed on the CPU
    python tests/functional/visit.py --row NAME --row NAME            # these rows again
    python tests/functional/visit.py --markdown out/visit             # the section for docs/gpu-results.md

`plan` has the order. Rows run in a process of their own, which is started again where it ends; this one keeps the
time, and writes each result when it has it: a line of results.jsonl, then the report. It can be stopped at any time:
SIGTERM, SIGINT and SIGHUP end the row that runs, and the report says which rows were not reached.
"""

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import report
from report import FINE_TUNE, HUGGING_FACE, RESUMED, UNINTERRUPTED, Outcome, Result


RESULTS = "results.jsonl"
START_S = 120  # imports from a cold disk
GRACE_S = 20  # between the end of a row's time, or a signal, and the end of the process that runs it
# What a device answers to everything once it has failed; another process gets a working one.
POISONED = re.compile("CUDA error|HIP error|AcceleratorError|device-side assert")


@dataclass(frozen=True)
class Item:
    """A row on the plan.

    Attributes:
        part: Of the plan, from 1.
        name: The row's name.
        kind: Rows of a kind take about the same time.
        typical_s: Seconds that such a row takes, as far as nobody has measured it here.
        limit_s: Seconds that it may take.
        model: For the report.
        parallelism: For the report.
        left_out: Why it need not run here, if so.
    """

    part: int
    name: str
    kind: str
    typical_s: float
    limit_s: float
    model: str = ""
    parallelism: str = ""
    left_out: str = ""


class Visit:
    """Goes through a plan while there is time.

    Args:
        items: The plan.
        ask: Runs a row within so many seconds. What goes wrong is in the result, and nothing is raised.
        record: Takes each result at once.
        platform: For the report.
        seconds: The budget.
        signals: The names of signals that have arrived; none runs after the first.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        items: Sequence[Item],
        ask: Callable[[Item, float], Result],
        record: Callable[[Item, Result], None],
        platform: str,
        seconds: float,
        signals: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.items = items
        self.ask = ask
        self.record = record
        self.platform = platform
        self.clock = clock
        self.deadline = clock() + seconds
        self.signals = signals
        self.took: dict[str, float] = {}

    def go(self) -> None:
        """Run each row, or say why it doesn't."""
        for item in self.items:
            self.record(item, self.result(item))

    def result(self, item: Item) -> Result:
        """Run a row if there is reason and time to."""
        left, needed = self.deadline - self.clock(), self.took.get(item.kind, item.typical_s)
        if self.signals:
            return self.left_out(item, f"not reached: stopped by {self.signals[0]}")
        if item.left_out:
            return self.left_out(item, item.left_out)
        if left < needed:
            return self.left_out(item, f"{max(left, 0):.0f} s were left, and it takes about {needed:.0f} s")
        started = self.clock()
        result = self.ask(item, min(item.limit_s, left))
        if result.outcome is Outcome.PASSED or result.figures:
            self.took[item.kind] = self.clock() - started
        # What a row meets when it is cut off is nothing that it did.
        cut = f"stopped by {self.signals[0]}" if self.signals else "the visit's time was over"
        if result.outcome is Outcome.FAILED and (self.signals or self.clock() >= self.deadline):
            result = replace(result, outcome=Outcome.LEFT_OUT, reason=f"{cut}: {result.reason}")
        return result

    def left_out(self, item: Item, reason: str) -> Result:
        """Say why a row doesn't run."""
        return Result(item.name, self.platform, item.parallelism, item.model, Outcome.LEFT_OUT, reason)


class Writer:
    """Keeps results: each is on the disk before the next row starts.

    Args:
        folder: Where they go. An earlier visit's stay in front of this one's.
        about: What the machine is, and what was asked for.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.results: list[Result] = []
        self.append({"visit": about, "at": now()})

    def record(self, item: Item, result: Result) -> None:
        """Keep a result: its line first, then the report."""
        self.append({"part": item.part, "result": asdict(result), "at": now()})
        self.results.append(result)
        report.write(self.results, self.folder)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to results.jsonl."""
        with (self.folder / RESULTS).open("a") as out:
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())


def now() -> str:
    """Give the time, as results.jsonl has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Worker:
    """The process that runs rows, and its successors: what ends it costs one row.

    Args:
        command: What starts it. It says what it is in its first line, and answers each line with one.
        log: Where what packages print goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = command
        self.log = log
        self.process: subprocess.Popen | None = None
        self.until = float("inf")
        self._read = b""

    def start(self) -> dict[str, Any] | None:
        """Start it, and give what it says about itself; None if it says nothing."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._read = b""
        with self.log.open("ab") as errors:
            # A session of its own: a terminal's ^C is for this process, which passes it on.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        return self._line(START_S)

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Give the answer to a question; None if the process ended before it gave one, or took too long."""
        if self.process is None and self.start() is None:
            return None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.end()
            return None
        return self._line(seconds)

    def stop(self) -> None:
        """Have the row that runs end soon."""
        self.until = time.monotonic() + GRACE_S
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process is None:
            return
        for each in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):  # of a question that it never took
            self.process.stdin.close()
        self.process = None

    def _line(self, seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = min(deadline, self.until) - time.monotonic()
            ready = select.select([self.process.stdout], [], [], max(min(left, 1), 0))[0]
            more = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not more and (ready or left <= 0):
                self.end()
                return None
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


def descendants(pid: int) -> list[int]:
    """Give the processes that a process has started, and those that these have, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for each in found:
        found += parents.get(each, [])
    return found


def ask_worker(worker: Worker, platform: str, item: Item, seconds: float) -> Result:
    """Have the worker run a row, and start another one where it can't be trusted any more."""
    started = time.monotonic()
    answer = worker.ask({"row": item.name, "limit_s": seconds}, seconds + GRACE_S)
    if answer is None:
        what = "the process that ran it ended, or took too long and was ended"
        took = time.monotonic() - started
        return Result(
            item.name, platform, item.parallelism, item.model, Outcome.FAILED, what, took, log=str(worker.log)
        )
    (result,) = report.loads(json.dumps([answer]))
    if result.outcome is Outcome.FAILED and POISONED.search(result.reason):
        worker.end()
    return result


# --- in the process that runs rows ---------------------------------------------------------------------------------


def plan(runner: Any, carried: Path | None, size: str | None) -> Iterator[tuple[int, Any, str]]:
    """Give the rows in the order of their worth, with the part of the plan, and why one need not run.

    Args:
        runner: The matrix's.
        carried: Releases that were written without Transformer Engine; None for where `gate.py` writes them.
        size: Of the model that is converted.
    """
    import conversion
    import gate
    import matrix

    # The report of the first row says whether anything works here, so it needs least.
    one_rank = [replace(row, other=None) for row in matrix.ROWS if row.layout.ranks == 1]
    packed = [row for row in one_rank if row.packed]
    size = size or (conversion.SMALL if runner.host.platform.name == "cpu" else "8b")
    parts = (
        [replace(one_rank[0], local=True)],
        [*(gate.Gate.of(family, carried or gate.CARRIED) for family in gate.FAMILIES), *packed],
        sorted((row for row in one_rank if row not in packed), key=lambda row: not row.default),
        [conversion.Conversion.of(size)],
        [conversion.Verify(name="verify", model="llama-3")],
    )
    seen: dict[Any, str] = {}
    for part, rows in enumerate(parts, start=1):
        for row in rows:
            alike = alike_here(runner, row)
            yield part, row, f"the same as {seen[alike]} on this host" if alike in seen else ""
            if not row.why_not(runner):
                seen.setdefault(alike, row.name)


def alike_here(runner: Any, row: Any) -> Any:
    """Give what rows share that do the same on this host, though another one would tell them apart."""
    if not hasattr(row, "layout"):
        return row.name
    kind = (runner.packed(row), runner.local(row), row.primus)
    return (row.model, row.layout, row.vocab_size, kind, *row.changes)


def work(options: argparse.Namespace) -> None:
    """Run the rows that are asked for on stdin, and answer with their results."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print shall not stand between the answers

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    import matrix
    import steps

    running: list[bool] = []

    def stop(number: int, _: Any) -> None:
        if running:
            running.clear()
            raise matrix.Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    host = steps.host()
    for left_by_another in options.work.iterdir():
        shutil.rmtree(left_by_another, ignore_errors=True)
    runner = matrix.Runner(host, options.work / str(os.getpid()), options.logs)
    planned = list(plan(runner, options.carried, options.size))
    rows = {row.name: row for _, row, _ in planned}
    items = [
        Item(part, row.name, type(row).__name__, row.typical_s, row.limit_s, row.model, row.parallelism, reason)
        for part, row, reason in planned
    ]
    answer({"machine": machine(host), "plan": [asdict(item) for item in items]})
    for line in sys.stdin:
        asked = json.loads(line)
        row = replace(rows[asked["row"]], limit_s=asked["limit_s"])
        started = time.time()
        running.append(True)
        try:
            result = runner.run(row)
            running.clear()
        except (Exception, matrix.Stopped) as error:
            stopped = isinstance(error, matrix.Stopped)
            outcome = Outcome.LEFT_OUT if stopped else Outcome.FAILED
            reason = f"stopped by {error}" if stopped else f"{type(error).__name__}: {error}"
            named = (row.name, host.platform.name, row.parallelism, row.model)
            result = Result(*named, outcome, reason, time.time() - started, host.versions, runner.command(row))
        running.clear()
        answer(asdict(result))


def machine(host: Any) -> dict[str, Any]:
    """Say what this machine is."""
    return {
        "platform": host.platform.name,
        "device": host.device,
        "devices": host.ranks,
        "driver": driver(),
        "processor cores": os.cpu_count(),
        "memory, GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 10**9),
        "libraries": dict(host.libraries),
        "missing": dict(host.missing),
        "versions": dict(host.versions),
    }


def driver() -> str:
    """Give the version of the GPU's driver, as far as somebody here knows it."""
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text().strip() if amd.exists() else ""


# --- the form that is checked in -----------------------------------------------------------------------------------

COLUMNS = (
    "row",
    "result",
    "seconds",
    "first loss: Megatron-LM, Hugging Face",
    "last loss",
    "resumed against uninterrupted, largest difference",
    "measured, or why not",
)


def markdown(folder: Path) -> str:
    """Write what docs/gpu-results.md takes: for each visit in a folder a heading, what the machine is, its rows."""
    visits: list[list[dict[str, Any]]] = []
    for line in map(json.loads, (folder / RESULTS).read_text().splitlines()):
        if "visit" in line:
            visits.append([])
        visits[-1].append(line)
    return "\n".join(section(first, rows) for first, *rows in visits)


def section(line: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> str:
    """Write one visit.

    Args:
        line: Its first line.
        own: The lines of its results.
    """
    about, found = line["visit"], line["visit"]["machine"]
    results = report.loads(json.dumps([each["result"] for each in own]))
    began = datetime.fromisoformat(line["at"])
    minutes = (datetime.fromisoformat(own[-1]["at"]) - began).total_seconds() / 60 if own else 0
    hardware = f"{found['devices']} x {found['device']}" if found["platform"] != "cpu" else found["device"]
    facts = [
        *([f"driver {found['driver']}"] if found["driver"] else []),
        *([f"image {about['image']}"] if about["image"] else []),
        f"{found['processor cores']} cores, {found['memory, GB']} GB",
        report.join(found["versions"]),
        *(f"no {name}: {why}" for name, why in found["missing"].items() if found["platform"] != "cpu"),
    ]
    text = [
        f"## {began:%-d %B %Y}: {report.escape(hardware)} ({found['platform']})",
        "",
        f"`{about['command']}`, {minutes:.1f} of {about['minutes']:g} minutes: {report.summary(results)}.",
        "",
        f"{report.escape('; '.join(facts))}.",
        "",
        report.line(COLUMNS),
        report.line("--:" if name == "seconds" else "---" for name in COLUMNS),
        *(report.line(map(report.escape, cells(result.printable()))) for result in results),
    ]
    return "\n".join(text) + "\n"


def cells(result: Result) -> tuple[str, ...]:
    """Give one row's `COLUMNS`."""
    curves = result.curves
    first = [f"{curves[name][0][1]:.4f}" for name in (FINE_TUNE, HUGGING_FACE) if curves.get(name)]
    resumed = curves.get(RESUMED, [])
    apart = report.largest_difference(resumed, dict(curves.get(UNINTERRUPTED, [])))
    figures = report.join_figures(result.figures)
    return (
        result.name,
        result.outcome,
        "" if result.outcome is Outcome.LEFT_OUT else f"{result.seconds:.1f}",
        ", ".join(first),
        f"{resumed[-1][1]:.4f}" if resumed else "",
        "" if apart is None else f"{apart:.2g}",
        "; ".join(text for text in (figures, result.headline) if text),
    )


# --- the command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Visit, run rows for a visit, or print one."""
    parser = argparse.ArgumentParser(description="Run the functional matrix on this machine within a time budget.")
    parser.add_argument("--minutes", type=float, default=10, help="the budget (%(default)s)")
    parser.add_argument("--platform", choices=("cpu", "cuda", "rocm"), help="fail unless this is here; default: found")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="what `gate.py write` wrote (dist/carried)")
    parser.add_argument("--row", action="append", metavar="NAME", help="this row; can be repeated; default: the plan")
    sizes = ("small", "1b", "3b", "8b")
    parser.add_argument("--size", choices=sizes, help="of the converted model; default: 8b, and small on a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/visit"), metavar="DIR", help="results (%(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="checkpoints go below it; default: where TMPDIR says")
    parser.add_argument("--image", default="", help="what to note as the container's image")
    parser.add_argument("--markdown", type=Path, metavar="DIR", help="print the visits whose results are in DIR")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--logs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.markdown:
        sys.stdout.write(markdown(options.markdown))
    elif options.worker:
        work(options)
    else:
        if options.work:
            options.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.work, prefix="visit-", ignore_cleanup_errors=True) as folder:
            options.work = Path(folder)
            sys.exit(visit(options))


def visit(options: argparse.Namespace) -> int:
    """Go through the plan.

    Returns:
        The exit code: 0 if some row passed and none failed.
    """
    logs = options.out / f"visit-{1 + len(list(options.out.glob('visit-*')))}"
    worker = Worker(worker_command(options, logs), logs / "worker.txt")
    began = time.monotonic()
    signals: list[str] = []

    def stop(number: int, _: Any) -> None:
        signals.append(signal.Signals(number).name)
        worker.stop()

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, stop)
    hello = worker.start()
    if hello is None:
        said = worker.log.read_text(errors="replace").strip().splitlines()
        sys.stderr.write(f"error: no row can run here: {said[-1] if said else 'no word why'}; see {worker.log}\n")
        return 1
    items = [Item(**each) for each in hello["plan"]]
    if unknown := set(options.row or []) - {item.name for item in items}:
        worker.end()
        known = ", ".join(item.name for item in items)
        sys.stderr.write(f"error: no row is named {min(unknown)!r}; choose of {known}\n")
        return 2
    about = {"command": shlex.join([*own_command(options, in_public=True), f"--minutes={options.minutes:g}"])}
    about |= {"minutes": options.minutes, "image": options.image, "machine": hello["machine"]}
    writer = Writer(options.out, about)
    platform = hello["machine"]["platform"]
    tell(json.dumps(hello["machine"]))
    chosen = [item for item in items if not options.row or item.name in options.row]
    seconds = options.minutes * 60 - (time.monotonic() - began)
    ask = partial(ask_worker, worker, platform)
    try:
        Visit(chosen, ask, show(writer), platform, seconds, signals).go()
    finally:
        worker.end()
    tell(f"{report.summary(writer.results)}; report: {options.out / 'report.html'}")
    return 0 if report.succeeded(writer.results) else 1


def show(writer: Writer) -> Callable[[Item, Result], None]:
    """Give what keeps a result and prints it."""

    def record(item: Item, result: Result) -> None:
        writer.record(item, result)
        told = "; ".join(text for text in (report.join_figures(result.figures), result.headline) if text)
        tell(f"{item.part}  {result.name:32} {result.outcome:9} {result.seconds:6.1f} s  {told}")

    return record


def tell(text: str) -> None:
    """Print a line, if there is still a terminal."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def own_command(options: argparse.Namespace, in_public: bool = False) -> list[str]:
    """Give the command without budget and rows; in public without where this machine has its folders."""
    carried = options.carried and (options.carried.name if in_public else options.carried)
    given = {"--platform": options.platform, "--carried": carried, "--size": options.size}
    return ["python3", "tests/functional/visit.py", *(f"{name}={value}" for name, value in given.items() if value)]


def worker_command(options: argparse.Namespace, logs: Path) -> list[str]:
    """Give what starts the process that runs rows."""
    given = {
        "--logs": logs.absolute(),
        "--carried": options.carried and options.carried.absolute(),
        "--work": options.work.absolute(),
        "--size": options.size,
    }
    # For steps.py and matrix.py, whose names for these this process does not import.
    platform = [f"FUNCTIONAL_PLATFORM={options.platform}"] if options.platform else []
    alone = f"FUNCTIONAL_COMMAND={shlex.join(own_command(options))}"
    # With the emulation of CUDA the devices of a host are in the way, so torch shall not find them.
    hidden = ["CUDA_VISIBLE_DEVICES=-1", "HIP_VISIBLE_DEVICES=-1"] if options.platform == "cpu" else []
    settings = ["HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false", alone, *platform, *hidden]
    # Images switch bytecode off, and then every process compiles torch's and transformers' modules anew.
    command = [
        "env",
        "--unset=PYTHONDONTWRITEBYTECODE",
        *settings,
        sys.executable,
        str(Path(__file__).absolute()),
        "--worker",
    ]
    return [*command, *(f"{name}={value}" for name, value in given.items() if value)]


if __name__ == "__main__":
    main()
