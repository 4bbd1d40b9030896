# SPDX-License-Identifier: Apache-2.0
"""The matrix as data, and the comparisons that its stages make."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matrix
import primus
import pytest
from platforms import PLATFORMS, Host
from report import Outcome, Result


def test_flags_of_a_layout() -> None:
    assert matrix.ONE.flags(4) == []
    assert matrix.TP2_SP.flags(4) == ["--tensor-model-parallel-size=2", "--sequence-parallel"]
    assert matrix.PP2_INTERLEAVED.flags(4)[-1] == "--num-layers-per-virtual-pipeline-stage=1"
    assert "--expert-tensor-parallel-size=1" in matrix.TP2_EP2.flags(4)


@pytest.mark.parametrize("layout", dict.fromkeys(row.layout for row in matrix.ROWS), ids=lambda layout: layout.name)
def test_ranks_hold_what_is_cut_over_them(layout: matrix.Layout) -> None:
    assert layout.ranks % (layout.tp * layout.pp) == 0
    assert layout.ranks % (layout.ep * layout.pp) == 0


def test_rows_by_name() -> None:
    assert [row.name for row in matrix.rows(["llama-3-tp2"])] == ["llama-3-tp2"]
    assert matrix.rows() == [row for row in matrix.ROWS if row.default]
    assert matrix.rows(everything=True) == list(matrix.ROWS)
    with pytest.raises(ValueError, match="no row is named 'llama-4'; choose from llama-3-1-rank"):
        matrix.rows(["llama-4"])


@pytest.mark.parametrize("expected", [{1: 2.1}, {1: math.nan}, {2: 2.0}, {}], ids=str)
def test_losses_that_differ_are_refused(expected: dict[int, float]) -> None:
    with pytest.raises(AssertionError, match="curve: differ by .* at iteration 1, expected at most 0.01"):
        matrix.expect_close({1: 2.0}, expected, 0.01, "curve")


def test_no_losses_are_refused() -> None:
    with pytest.raises(AssertionError, match="curve"):
        matrix.expect_close({}, {1: 2.0}, 0.01, "curve")


def test_equal_losses_pass() -> None:
    matrix.expect_close({2: 2.0}, {1: 3.0, 2: 2.005}, 0.01, "curve")


def runner_on(folder: Path, platform: str, ranks: int, **libraries: str) -> matrix.Runner:
    host = Host(PLATFORMS[platform], ranks, "a device", libraries=libraries)
    return matrix.Runner(host, folder / "work", folder / "logs")


@pytest.fixture
def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix.RowRun, "go_on", lambda self: None)
    monkeypatch.setattr(matrix, "CORE", "0.19.2")


@pytest.mark.usefixtures("nothing_trains")
def test_a_host_with_one_device_runs_the_rows_of_one_rank(tmp_path: Path) -> None:
    runner = runner_on(tmp_path, "cuda", 1, transformer_engine="2.8.0")
    results = {row.name: runner.run(row) for row in matrix.ROWS}
    ran = [name for name, result in results.items() if result.outcome is Outcome.PASSED]
    assert ran == [row.name for row in matrix.ROWS if row.layout == matrix.ONE and not row.primus]
    assert results[ran[0]].parallelism == "1 rank"
    assert results[ran[0]].headline == "not resumed with TP2: needs 2 devices, and 1 x a device found"
    left_out = results["llama-3-tp2"]
    assert left_out.headline == "needs 2 devices, and 1 x a device found"
    assert left_out.parallelism == "TP2, then 1 rank"


@pytest.mark.usefixtures("nothing_trains")
def test_a_gpu_without_transformer_engine_leaves_out_what_local_layers_refuse(tmp_path: Path) -> None:
    bare = runner_on(tmp_path, "rocm", 2)
    for name, what in {
        "llama-3-tp2-sequence-parallel": "sequence parallelism",
        "llama-3-1-rank-packed": "packed",
    }.items():
        result = bare.run(matrix.rows([name])[0])
        assert result.outcome is Outcome.LEFT_OUT
        assert f"needs Transformer Engine for {what}" in result.headline
    assert bare.run(matrix.rows(["llama-3-tp2"])[0]).outcome is Outcome.PASSED
    # EP2 fits, and the layout that it is resumed with does not.
    assert "not resumed with TP2 × EP2: needs Transformer" in bare.run(matrix.rows(["qwen3-moe-ep2"])[0]).headline
    on_cpu = runner_on(tmp_path, "cpu", 2)
    assert on_cpu.run(matrix.rows(["llama-3-tp2-sequence-parallel"])[0]).outcome is Outcome.PASSED


@pytest.mark.usefixtures("nothing_trains")
def test_the_row_of_primus_needs_a_checkout_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, row = runner_on(tmp_path, "cpu", 4), matrix.rows(["llama-3-1-rank-primus"])[0]
    assert row.default
    monkeypatch.delenv(primus.VARIABLE, raising=False)
    assert runner.run(row).headline == "needs a checkout of AMD-AGI/Primus: --primus DIR"
    assert runner.run(row).outcome is Outcome.LEFT_OUT
    monkeypatch.setenv(primus.VARIABLE, str(tmp_path))
    assert not runner.packed(row)
    monkeypatch.setattr(matrix.PrimusRun, "go_on", lambda self: None)
    assert runner.run(row).outcome is Outcome.PASSED


def test_what_the_hook_of_primus_prints_for_the_training() -> None:
    lines = ["[OK] done", "extra.pretrained_checkpoint=/a b/c=d", "extra.finetune=true", "not extra.load=x"]
    assert primus.extras(lines) == {"pretrained_checkpoint": "/a b/c=d", "finetune": "true"}


@pytest.mark.usefixtures("nothing_trains")
def test_packed_rows_need_a_core_that_packs_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, row = runner_on(tmp_path, "cuda", 2, transformer_engine="2.8.0"), matrix.rows(["llama-3-1-rank"])[0]
    assert runner.packed(row)
    monkeypatch.setattr(matrix, "CORE", "0.18.2")
    assert not runner.packed(row)
    assert runner.run(matrix.rows(["llama-3-1-rank-packed"])[0]).headline == (
        "needs megatron-core >=0.19, and 0.18.2 is installed"
    )


def run_into(error: type[Exception] | None, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> Result:
    def go_on(self: matrix.RowRun) -> None:
        with self.stage("export"):
            if error:
                raise error("no tensor of that name")
            time.sleep(10)

    monkeypatch.setattr(matrix.RowRun, "go_on", go_on)
    return runner_on(folder, "cpu", 4).run(replace(matrix.rows(["llama-3-1-rank"])[0], **changes))


def test_what_fails_in_this_process_leaves_a_log_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_into(KeyError, tmp_path, monkeypatch)
    assert result.headline.startswith("row llama-3-1-rank failed at stage “export”: KeyError: 'no tensor")
    assert 'raise error("no tensor of that name")' in Path(result.log).read_text()


def test_a_row_that_takes_too_long_is_stopped_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_into(None, tmp_path, monkeypatch, limit_s=0.2)
    assert "failed at stage “export”: TimeoutError: took more than 0 s" in result.headline
    assert result.seconds < 5


def test_command_that_runs_a_row_alone_is_this_session_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, row = runner_on(tmp_path, "cpu", 4), matrix.rows(["llama-3-tp2"])[0]
    monkeypatch.delenv(matrix.COMMAND_VARIABLE, raising=False)
    assert runner.command(row) == 'python3 -m nox -s "functional(cpu)" -- --row llama-3-tp2'
    session = 'python3 -m nox -s "functional_versions(0.18.2)" --'
    monkeypatch.setenv(matrix.COMMAND_VARIABLE, session)
    assert runner.command(row) == f"{session} --row llama-3-tp2"


def test_a_session_in_which_no_row_ran_fails(tmp_path: Path) -> None:
    tests = Path(matrix.__file__).parent
    options = ["--platform=cpu", "--row=llama-3-tp8", f"--report={tmp_path}", f"--rootdir={tests.parents[1]}"]
    done = subprocess.run([sys.executable, "-m", "pytest", str(tests), *options], capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "0 passed, 0 failed, 1 left out" in done.stdout
    assert "needs 8 ranks, and CPU rows have at most 4" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize("option", ["--primus", "--megatron-lm"])
def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, option: str) -> None:
    tests = Path(matrix.__file__).parent
    command = [sys.executable, "-m", "pytest", str(tests), f"{option}={tmp_path}", f"--rootdir={tests.parents[1]}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{tmp_path} has no " in done.stderr and "pass a checkout of" in done.stderr
