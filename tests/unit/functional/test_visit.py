# SPDX-License-Identifier: Apache-2.0
"""A visit keeps to its order and its budget, and loses nothing: with rows that only pretend to run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import conversion
import gate
import matrix
import pytest
import report
import visit
from platforms import PLATFORMS, Host
from report import Outcome, Result


ITEMS = [
    visit.Item(1, "first", "Row", typical_s=60, limit_s=600),
    visit.Item(2, "gate-a", "Gate", typical_s=20, limit_s=120),
    visit.Item(2, "gate-b", "Gate", typical_s=20, limit_s=120),
    visit.Item(3, "second", "Row", typical_s=60, limit_s=600),
]
MACHINE = {
    "platform": "cuda",
    "device": "NVIDIA H100",
    "devices": 1,
    "driver": "580.1",
    "processor cores": 16,
    "memory, GB": 128,
    "libraries": {},
    "missing": {"transformer_engine": "ModuleNotFoundError: none"},
    "versions": {"torch": "2.11.0", "megatron-core": "0.19.2"},
}
ABOUT = {"command": "visit.py", "minutes": 10, "image": "", "machine": MACHINE}


class Clock:
    """Time that passes when a row says so, and rows that say so."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.limits: dict[str, float] = {}
        self.results: dict[str, Result] = {}

    def __call__(self) -> float:
        return self.now

    def ask(self, item: visit.Item, limit: float) -> Result:
        self.limits[item.name] = limit
        self.now += min(self.seconds.get(item.name, 10), limit)
        return self.results.get(item.name, passed(item.name))


def passed(name: str) -> Result:
    return Result(name, "cpu", "1 rank", "llama-3", Outcome.PASSED, seconds=1)


def failed(name: str, reason: str = "no") -> Result:
    return replace(passed(name), outcome=Outcome.FAILED, reason=reason)


def go(clock: Clock, seconds: float, items: list[visit.Item] = ITEMS) -> dict[str, Result]:
    found: dict[str, Result] = {}
    visit.Visit(
        items, clock.ask, lambda item, result: found.update({item.name: result}), "cpu", seconds, (), clock
    ).go()
    return found


def outcomes(found: dict[str, Result]) -> list[str]:
    return [result.outcome.value for result in found.values()]


def test_rows_run_in_the_order_of_the_plan() -> None:
    clock = Clock()
    assert outcomes(go(clock, 600)) == ["passed"] * 4
    assert list(clock.limits) == ["first", "gate-a", "gate-b", "second"]
    # A row's own limit, or what is left.
    assert clock.limits == {"first": 600, "gate-a": 120, "gate-b": 120, "second": 570}


def test_a_row_that_no_longer_fits_is_named_and_a_shorter_one_still_runs() -> None:
    clock = Clock(first=70)
    found = go(clock, 100, [ITEMS[0], ITEMS[3], ITEMS[1]])
    assert outcomes(found) == ["passed", "left out", "passed"]
    assert found["second"].reason == "takes about 70 s, and 30 s were left"


def test_what_a_row_took_here_is_what_the_next_of_its_kind_is_expected_to_take() -> None:
    clock = Clock(first=8)
    assert outcomes(go(clock, 70, [ITEMS[0], ITEMS[3]])) == ["passed", "passed"]
    # Not so where it failed early: that says nothing of one that goes the whole way.
    clock = Clock(first=8, second=8)
    clock.results["first"] = failed("first")
    assert outcomes(go(clock, 65, [ITEMS[0], ITEMS[3]])) == ["failed", "left out"]


def test_a_failure_does_not_end_the_visit() -> None:
    clock = Clock()
    clock.results["first"] = failed("first")
    assert outcomes(go(clock, 600)) == ["failed", "passed", "passed", "passed"]


def test_the_end_of_the_visit_s_time_is_no_failure_of_the_row_that_ran() -> None:
    clock = Clock(first=500)
    clock.results["first"] = failed("first", "took more than 100 s")
    found = go(clock, 100)
    assert outcomes(found) == ["left out"] * 4
    assert found["first"].reason == "the time of the visit was over: took more than 100 s"
    assert found["gate-a"].reason == "takes about 20 s, and 0 s were left"


def test_a_row_that_need_not_run_says_why() -> None:
    found = go(Clock(), 600, [replace(ITEMS[0], left_out="the same as another")])
    assert found["first"].reason == "the same as another"


def test_after_a_signal_the_rows_that_were_not_reached_are_named() -> None:
    found: dict[str, Result] = {}
    signals: list[str] = []

    def ask(item: visit.Item, limit: float) -> Result:
        signals.append("SIGTERM")
        return failed(item.name, "the process ended")

    visit.Visit(ITEMS, ask, lambda item, result: found.update({item.name: result}), "cpu", 600, signals).go()
    assert outcomes(found) == ["left out"] * 4
    assert found["first"].reason == "stopped by SIGTERM: the process ended"
    assert found["second"].reason == "not reached: stopped by SIGTERM"


def test_each_result_is_on_the_disk_before_the_next_row(tmp_path: Path) -> None:
    writer = visit.Writer(tmp_path, ABOUT)
    for number, item in enumerate(ITEMS[:2], start=1):
        writer.record(item, passed(item.name))
        lines = [json.loads(line) for line in (tmp_path / visit.RESULTS).read_text().splitlines()]
        assert [line["result"]["name"] for line in lines[1:]] == [each.name for each in ITEMS[:number]]
        assert f"{number} passed" in (tmp_path / "report.txt").read_text()
    assert lines[0]["visit"]["machine"] == MACHINE
    # Another visit adds to it.
    visit.Writer(tmp_path, ABOUT).record(ITEMS[3], failed("second"))
    assert len((tmp_path / visit.RESULTS).read_text().splitlines()) == 5


def test_markdown_has_a_section_for_each_visit(tmp_path: Path) -> None:
    curves = {
        report.UNINTERRUPTED: [(1, 6.0), (2, 5.0)],
        report.FINE_TUNE: [(1, 6.0)],
        report.HUGGING_FACE: [(1, 6.001)],
        report.RESUMED: [(2, 5.25)],
    }
    visit.Writer(tmp_path, ABOUT).record(ITEMS[0], replace(passed("first"), curves=curves, figures={"peak GB": 1.234}))
    visit.Writer(tmp_path, ABOUT).record(ITEMS[3], failed("second", "no <tensor>\nat all"))
    text = visit.markdown(tmp_path)
    assert text.count("## ") == 2
    assert "1 x NVIDIA H100 (cuda)" in text and "driver 580.1" in text and "no transformer\\_engine:" in text
    assert "| first | passed | 1.0 | 6.0000, 6.0010 | 5.2500 | 0.25 | peak GB 1.23 |" in text
    assert "| second | failed | 1.0 |  |  |  | no &lt;tensor> |" in text


def worker(tmp_path: Path, code: str) -> visit.Worker:
    start = "import json, os, signal, sys, time\nprint('{}', flush=True)\nasked = sys.stdin.readline\n"
    return visit.Worker([sys.executable, "-c", start + code], tmp_path / "worker.txt")


def test_a_process_that_ends_costs_one_row(tmp_path: Path) -> None:
    dying = worker(tmp_path, "asked(); sys.stderr.write('out of memory'); os.kill(os.getpid(), signal.SIGKILL)")
    for _ in range(2):
        result = visit.ask_worker(dying, "cpu", ITEMS[0], 5)
        assert result.outcome is Outcome.FAILED
        assert "the process that ran it ended" in result.reason
    assert Path(result.log).read_text() == "out of memory" * 2


def test_a_process_that_has_ended_before_it_is_asked_costs_one_row(tmp_path: Path) -> None:
    ended = worker(tmp_path, "")
    ended.start()
    ended.process.wait()
    assert visit.ask_worker(ended, "cpu", ITEMS[0], 5).outcome is Outcome.FAILED
    assert ended.process is None


def test_a_process_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "GRACE_S", 0.1)
    hanging = worker(
        tmp_path,
        f"import subprocess; child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)",
    )
    hanging.start()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    assert visit.ask_worker(hanging, "cpu", ITEMS[0], 0.1).outcome is Outcome.FAILED
    child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 60
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_device_that_failed_gets_another_process(tmp_path: Path) -> None:
    answer = report.dumps([failed("first", "RuntimeError: CUDA error: an illegal memory access")])
    poisoned = worker(tmp_path, f"asked(); print(json.dumps(json.loads({answer!r})[0]), flush=True); asked()")
    result = visit.ask_worker(poisoned, "cpu", ITEMS[0], 60)
    assert "illegal memory access" in result.reason
    assert poisoned.process is None


FAKE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import visit
item = {{"kind": "Row", "typical_s": 1, "limit_s": 60, "part": 1}}
code = '''
import json, signal, sys, time
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
print(json.dumps({{"machine": {machine}, "plan": [{{**{{item}}, "name": name}} for name in "abc"]}}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["row"]
    result = dict(name=name, platform="cuda", parallelism="", model="", outcome="passed", curves={{}})
    try:
        time.sleep(60 if name == "b" else 0)
    except KeyboardInterrupt:
        result |= dict(outcome="left out", reason="stopped at stage x")
    print(json.dumps(result), flush=True)
'''.replace("{{item}}", repr(item))
visit.worker_command = lambda options, logs: [sys.executable, "-c", code]
sys.argv = ["visit.py", "--out", {out!r}]
visit.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_row_that_runs_and_the_report_is_written(tmp_path: Path, number: signal.Signals) -> None:
    code = FAKE.format(tests=str(Path(visit.__file__).parent), machine=MACHINE, out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline()) == MACHINE
    assert process.stdout.readline().split()[:3] == ["1", "a", "passed"]
    time.sleep(1)
    process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert "1 passed, 0 failed, 2 left out" in said
    found = [json.loads(line)["result"] for line in (tmp_path / visit.RESULTS).read_text().splitlines()[1:]]
    assert [(each["name"], each["reason"]) for each in found] == [
        ("a", ""),
        ("b", "stopped at stage x"),
        ("c", f"not reached: stopped by {number.name}"),
    ]
    assert "not reached" in (tmp_path / "report.txt").read_text()
    assert process.returncode == 0


def test_one_line_says_why_no_row_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    why = "platforms.PlatformError: asked for cuda, found cpu"
    monkeypatch.setattr(
        visit, "worker_command", lambda options, logs: [sys.executable, "-c", f"raise SystemExit({why!r})"]
    )
    monkeypatch.setattr(sys, "argv", ["visit.py", "--platform=cuda", f"--out={tmp_path}"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit, match="1"):
        visit.main()
    assert capsys.readouterr().err.startswith(f"error: no row can run here: {why}; see ")


# --- the plan --------------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, platform: str = "cuda", **libraries: str) -> list[tuple[int, str, str]]:
    runner = matrix.Runner(Host(PLATFORMS[platform], 1, "a device", libraries), tmp_path / "work", tmp_path / "logs")
    return [(part, row.name, reason) for part, row, reason in visit.plan(runner, None, conversion.SMALL)]


def test_the_plan_has_each_row_of_one_rank_and_is_in_the_order_of_worth(tmp_path: Path) -> None:
    found = planned(tmp_path, transformer_engine="2.20.2")
    assert [part for part, _, _ in found] == sorted(part for part, _, _ in found)
    names = [name for _, name, _ in found]
    assert len(set(names)) == len(names)
    assert names[:2] == ["llama-3-1-rank-local", "gate-llama-2"]
    assert {row.name for row in matrix.ROWS if row.layout.ranks == 1} <= set(names)
    assert names[-2:] == ["convert-small", "verify"]
    third = [name for part, name, _ in found if part == 3]
    assert third[0] == "llama-3-1-rank"  # of the default set


@pytest.mark.parametrize(
    ("libraries", "expected"),
    [
        # With Transformer Engine every row is packed, and without every row has local layers.
        ({"transformer_engine": "2.20.2"}, {"llama-3-1-rank": "the same as llama-3-1-rank-packed on this host"}),
        ({}, {"llama-3-1-rank": "the same as llama-3-1-rank-local on this host"}),
    ],
    ids=["with Transformer Engine", "without"],
)
def test_rows_that_would_do_the_same_here_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libraries: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(matrix, "CORE", "0.19.2")
    assert {name: reason for _, name, reason in planned(tmp_path, **libraries) if reason} == expected


def test_flags_of_local_layers_beside_transformer_engine(tmp_path: Path) -> None:
    host = Host(PLATFORMS["cuda"], 1, "a device", {"transformer_engine": "2.20.2"})
    runner, row = matrix.Runner(host, tmp_path, tmp_path), replace(matrix.ROWS[0], local=True)
    expected = ["--transformer-impl=local", "--no-persist-layer-norm", "--no-rope-fusion"]
    assert runner.layer_flags(row) == expected
    assert not runner.packed(row)
    assert runner.layer_flags(matrix.ROWS[0]) == []
    without = matrix.Runner(Host(PLATFORMS["cuda"], 1, "a device"), tmp_path, tmp_path)
    assert without.layer_flags(row) == []  # the host's flags say so already


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    for family in ("llama-3", "gemma"):
        (tmp_path / "carried" / family / "megatron").mkdir(parents=True)
    return tmp_path / "carried"


FIGURES = {
    "logit difference, float32": 1e-6,
    "logit difference, bf16": 0.01,
    "logit difference, transformers in bf16": 0.01,
    "modules of Transformer Engine": 0,
}


def through_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: gate.Gate, host: Host, **figures: float
) -> Result:
    class Computer:
        def ask(self, folder: Path) -> dict[str, float]:
            return FIGURES | figures

    monkeypatch.setattr(gate.Computer, "of", lambda runner: Computer())
    return matrix.Runner(host, tmp_path / "work", tmp_path / "logs").run(row)


WITH, WITHOUT = (Host(PLATFORMS["cuda"], 1, "a device", found) for found in ({"transformer_engine": "2.20.2"}, {}))
ON_CPU = Host(PLATFORMS["cpu"], 4, "a processor")
MODULES = "modules of Transformer Engine"


@pytest.mark.parametrize(
    ("family", "host", "figures", "outcome", "reason"),
    [
        ("llama-3", WITH, {MODULES: 9}, "passed", ""),
        ("llama-3", WITH, {}, "failed", "modules are Transformer Engine's: found False, expected True"),
        ("llama-3", WITH, {MODULES: 9, "logit difference, float32": 0.5}, "failed", "logits in float32: differ"),
        ("llama-3", WITH, {MODULES: 9, "logit difference, bf16": 0.5}, "failed", "logits in bf16: differ"),
        ("llama-3", WITH, {MODULES: 9, "logit difference, bf16": float("nan")}, "failed", "logits in bf16: differ"),
        ("llama-3", WITHOUT, {}, "left out", "needs Transformer Engine, which can't be imported here"),
        ("qwen3", WITH, {MODULES: 9}, "left out", "found no release checkpoint of qwen3; run"),
        ("llama-3", ON_CPU, {}, "left out", "rehearsed with Megatron Core's local layers; the gate needs"),
        ("llama-3", ON_CPU, {"logit difference, float32": 1e-3}, "failed", "logits in float32: differ"),
        ("gemma", ON_CPU, {}, "left out", "needs Transformer Engine: PyTorch's norms are not zero-centered"),
    ],
)
def test_the_gate_passes_only_what_transformer_engine_computed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    carried: Path,
    family: str,
    host: Host,
    figures: dict[str, float],
    outcome: str,
    reason: str,
) -> None:
    result = through_the_gate(tmp_path, monkeypatch, gate.Gate.of(family, carried), host, **figures)
    assert (result.outcome, reason in result.reason) == (outcome, True), result.reason


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], gate.Computer]:
    def make(code: str) -> gate.Computer:
        start = "import json, os, sys\nfor line in sys.stdin:\n    folder = line.strip()\n    "
        (tmp_path / "python").write_text(f"#!{os.path.realpath(sys.executable)}\n{start}{code}\n")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        (tmp_path / "python").chmod(0o755)
        return gate.Computer(tmp_path / "gate.txt")

    return make


def test_a_process_answers_for_one_family_after_the_other(tmp_path: Path, computer) -> None:
    asked = computer("print(json.dumps({'figures': {folder: 1.0}}), flush=True)")
    for name in "ab":
        assert asked.ask(tmp_path / name) == {str(tmp_path / name): 1.0}
    asked.end()


def test_a_weight_that_differs_leaves_the_process_to_the_next_family(tmp_path: Path, computer) -> None:
    asked = computer("print(json.dumps({'differs': 'norm.weight: 60 of 64 values differ'}), flush=True)")
    for _ in range(2):
        with pytest.raises(gate.steps.StepFailed, match="60 of 64 values differ"):
            asked.ask(tmp_path)
    asked.end()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(json.dumps({'error': 'KeyError: no such weight'}), flush=True)", "KeyError: no such weight"),
        ("sys.exit('RuntimeError: CUDA error')", "ended: RuntimeError: CUDA error"),
    ],
)
def test_what_a_family_meets_ends_the_process(tmp_path: Path, computer, code: str, expected: str) -> None:
    asked = computer(code)
    with pytest.raises(gate.steps.StepFailed, match=expected):
        asked.ask(tmp_path)
    assert asked.process.returncode is not None  # so that the next family gets another one


# --- conversion and verify -------------------------------------------------------------------------------------------


def test_a_model_that_the_disk_does_not_hold_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: usage._replace(free=20 * 10**9))
    result = matrix.Runner(ON_CPU, tmp_path / "work", tmp_path / "logs").run(conversion.Conversion.of("8b"))
    assert result.outcome is Outcome.LEFT_OUT
    assert result.reason == "needs 50 GB of disk, and 20 GB are free"


def test_verify_is_left_out_where_there_is_no_such_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "bridge", lambda: [sys.executable, "-c", "raise SystemExit('No such command')"])
    runner = matrix.Runner(ON_CPU, tmp_path / "work", tmp_path / "logs")
    result = runner.run(conversion.Verify(name="verify", model="llama-3"))
    assert result.outcome is Outcome.LEFT_OUT
    assert result.reason == "megatron-bridge verify: No such command"


# --- stop ------------------------------------------------------------------------------------------------------------


def test_a_row_that_is_stopped_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on(self: matrix.RowRun) -> None:
        self.figures["import, s"] = 1.5
        with self.stage("export"):
            raise matrix.Stopped("SIGTERM")

    monkeypatch.setattr(matrix.RowRun, "go_on", go_on)
    result = matrix.Runner(ON_CPU, tmp_path / "work", tmp_path / "logs").run(matrix.ROWS[0])
    assert (result.outcome, result.reason) == (Outcome.LEFT_OUT, "stopped by SIGTERM at stage “export”")
    assert result.figures == {"import, s": 1.5}
