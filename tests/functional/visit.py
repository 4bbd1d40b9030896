# SPDX-License-Identifier: Apache-2.0
"""A short visit to a machine with a GPU: run the most telling rows first, within a time budget.

    python tests/functional/visit.py --minutes 10                     # use what this machine has; results in out/visit
    python tests/functional/visit.py --platform cpu                   # rehearse the visit on the CPU
    python tests/functional/visit.py --row NAME --row NAME            # run only these rows
    python tests/functional/visit.py --markdown out/visit             # print the section for docs/gpu-results.md

`plan` defines the order. Rows run in a separate process, which is restarted when it ends. This process keeps the time.
It writes each result at once: a line of results.jsonl, then the report. You can stop it at any time: SIGTERM, SIGINT,
and SIGHUP end the current row, and the report names the rows that were not reached.
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
GRACE_S = 20  # from the end of a row's time, or a signal, until its process is killed
# A device that has failed answers every later call like this. A new process gets a working device.
POISONED = re.compile("CUDA error|HIP error|AcceleratorError|device-side assert")


@dataclass(frozen=True)
class Item:
    """A row on the plan.

    Attributes:
        part: The part of the plan, from 1.
        name: The row's name.
        kind: Rows of one kind take about the same time.
        typical_s: Seconds that such a row takes, until one has been measured here.
        limit_s: The most seconds that it may take.
        model: For the report.
        parallelism: For the report.
        left_out: The reason to leave it out here, if there is one.
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
    """Runs the rows of a plan until the time is over.

    Args:
        items: The plan.
        ask: Runs a row within this many seconds. It reports errors in the result and raises nothing.
        record: Called with each result at once.
        platform: For the report.
        seconds: The budget.
        signals: The names of the signals that have arrived. No row starts after the first.
        clock: Returns the time in seconds.
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
        """Run each row, or record why it doesn't run."""
        for item in self.items:
            self.record(item, self.result(item))

    def result(self, item: Item) -> Result:
        """Run a row, unless there is a reason to leave it out or too little time."""
        left, needed = self.deadline - self.clock(), self.took.get(item.kind, item.typical_s)
        if self.signals:
            return self.left_out(item, f"not reached: stopped by {self.signals[0]}")
        if item.left_out:
            return self.left_out(item, item.left_out)
        if left < needed:
            return self.left_out(item, f"takes about {needed:.0f} s, and {max(left, 0):.0f} s were left")
        started = self.clock()
        result = self.ask(item, min(item.limit_s, left))
        if result.outcome is Outcome.PASSED or result.figures:
            self.took[item.kind] = self.clock() - started
        # An error is not the row's fault if the row was cut off.
        cut = f"stopped by {self.signals[0]}" if self.signals else "the time of the visit was over"
        if result.outcome is Outcome.FAILED and (self.signals or self.clock() >= self.deadline):
            result = replace(result, outcome=Outcome.LEFT_OUT, reason=f"{cut}: {result.reason}")
        return result

    def left_out(self, item: Item, reason: str) -> Result:
        """Return the result of a row that doesn't run."""
        return Result(item.name, self.platform, item.parallelism, item.model, Outcome.LEFT_OUT, reason)


class Writer:
    """Saves results, each before the next row starts.

    Args:
        folder: The folder of the results. Results of earlier visits stay, before those of this visit.
        about: The machine, and what was asked for.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.results: list[Result] = []
        self.append({"visit": about, "at": now()})

    def record(self, item: Item, result: Result) -> None:
        """Save a result: its line first, then the report."""
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
    """Return the time in the format of results.jsonl."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Worker:
    """The process that runs rows. If it ends, one row is lost, and a new process takes over.

    Args:
        command: The command that starts it. Its first line describes it, and it answers each line with one line.
        log: The log of everything that packages print.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = command
        self.log = log
        self.process: subprocess.Popen | None = None
        self.until = float("inf")
        self._read = b""

    def start(self) -> dict[str, Any] | None:
        """Start it and return how it describes itself, or None if it says nothing."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._read = b""
        with self.log.open("ab") as errors:
            # In its own session, a terminal's ^C reaches only this process, which passes it on.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        return self._line(START_S)

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer to a question, or None if the process ended without one or took too long."""
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
        """Ask the process to end the current row soon."""
        self.until = time.monotonic() + GRACE_S
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End the process and everything that it has started."""
        if self.process is None:
            return
        for each in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):  # for a question that it never read
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
    """Return all descendants of a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for each in found:
        found += parents.get(each, [])
    return found


def ask_worker(worker: Worker, platform: str, item: Item, seconds: float) -> Result:
    """Let the worker run a row. If its device has failed, end it, so that the next row gets a new one."""
    started = time.monotonic()
    answer = worker.ask({"row": item.name, "limit_s": seconds}, seconds + GRACE_S)
    if answer is None:
        what = "the process that ran it ended, or took too long and was killed"
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
    """Yield the rows, the most telling first, each with its part of the plan and the reason to leave it out, if any.

    Args:
        runner: The runner of the matrix.
        carried: The folder of the gate's release checkpoints. Default: where `gate.py` writes them.
        size: The size of the model that is converted.
    """
    import conversion
    import gate
    import matrix

    # The first row shows whether anything works here, so it needs the least.
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
    """Return a key that is equal for rows that do the same on this host."""
    if not hasattr(row, "layout"):
        return row.name
    kind = (runner.packed(row), runner.local(row), row.primus)
    return (row.model, row.layout, row.vocab_size, kind, *row.changes)


def work(options: argparse.Namespace) -> None:
    """Run the rows that stdin asks for, and answer with their results."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what packages print out of the answers

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
    """Describe this machine."""
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
    """Return the version of the GPU's driver, or an empty string if it can't be found."""
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
    "largest difference from the uninterrupted run",
    "figures, or the reason",
)


def markdown(folder: Path) -> str:
    """Return the sections for docs/gpu-results.md: one for each visit in a folder, with the machine and the rows."""
    visits: list[list[dict[str, Any]]] = []
    for line in map(json.loads, (folder / RESULTS).read_text().splitlines()):
        if "visit" in line:
            visits.append([])
        visits[-1].append(line)
    return "\n".join(section(first, rows) for first, *rows in visits)


def section(line: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of one visit.

    Args:
        line: Its first line in results.jsonl.
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
    """Return the cells of one row, in the order of `COLUMNS`."""
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
    """Make a visit, run rows for one, or print one."""
    parser = argparse.ArgumentParser(description="Run the functional matrix on this machine within a time budget.")
    parser.add_argument("--minutes", type=float, default=10, help="the time budget; default: %(default)s")
    parser.add_argument("--platform", choices=("cpu", "cuda", "rocm"), help="default: the one that is found")
    parser.add_argument(
        "--carried", type=Path, metavar="DIR", help="what `gate.py write` wrote; default: dist/carried"
    )
    parser.add_argument("--row", action="append", metavar="NAME", help="run only this row; can be repeated")
    sizes = ("small", "1b", "3b", "8b")
    parser.add_argument("--size", choices=sizes, help="size of the converted model; default: 8b, or small on a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/visit"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--work", type=Path, metavar="DIR", help="write checkpoints below DIR; default: TMPDIR")
    parser.add_argument("--image", default="", help="the container image, for the report")
    parser.add_argument("--markdown", type=Path, metavar="DIR", help="print docs/gpu-results.md's section for DIR")
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
    """Run the plan.

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
        sys.stderr.write(f"error: no row can run here: {said[-1] if said else 'no output'}; see {worker.log}\n")
        return 1
    items = [Item(**each) for each in hello["plan"]]
    if unknown := set(options.row or []) - {item.name for item in items}:
        worker.end()
        known = ", ".join(item.name for item in items)
        sys.stderr.write(f"error: no row is named {min(unknown)!r}; choose from {known}\n")
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
    """Return a function that saves and prints a result."""

    def record(item: Item, result: Result) -> None:
        writer.record(item, result)
        told = "; ".join(text for text in (report.join_figures(result.figures), result.headline) if text)
        tell(f"{item.part}  {result.name:32} {result.outcome:9} {result.seconds:6.1f} s  {told}")

    return record


def tell(text: str) -> None:
    """Print a line, unless the terminal is gone."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def own_command(options: argparse.Namespace, in_public: bool = False) -> list[str]:
    """Return the command without budget and rows; in public, without the paths of this machine."""
    carried = options.carried and (options.carried.name if in_public else options.carried)
    given = {"--platform": options.platform, "--carried": carried, "--size": options.size}
    return ["python3", "tests/functional/visit.py", *(f"{name}={value}" for name, value in given.items() if value)]


def worker_command(options: argparse.Namespace, logs: Path) -> list[str]:
    """Return the command of the process that runs rows."""
    given = {
        "--logs": logs.absolute(),
        "--carried": options.carried and options.carried.absolute(),
        "--work": options.work.absolute(),
        "--size": options.size,
    }
    # steps.py and matrix.py name these variables; this process imports neither.
    platform = [f"FUNCTIONAL_PLATFORM={options.platform}"] if options.platform else []
    alone = f"FUNCTIONAL_COMMAND={shlex.join(own_command(options))}"
    # The emulation of CUDA refuses to work beside a real device, so hide devices from torch.
    hidden = ["CUDA_VISIBLE_DEVICES=-1", "HIP_VISIBLE_DEVICES=-1"] if options.platform == "cpu" else []
    settings = ["HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false", alone, *platform, *hidden]
    # Container images switch bytecode off. Then every process compiles the modules of torch and transformers again.
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
