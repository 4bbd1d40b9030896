# SPDX-License-Identifier: Apache-2.0
"""The subcommand `verify` says a verdict, and ends with its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron.bridge.cli import main
from megatron.bridge.cli import verify as subcommand
from megatron.bridge.verify.verdict import DIFFERS, FLAGS, NOT_PROVED, SAME, Verdict


FIGURES = {
    "largest_difference": 4e-6,
    "largest_logit": 4.0,
    "kl_divergence": 1e-12,
    "loss_transformers": 2.5,
    "loss_megatron": 2.5,
}


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        (Verdict(SAME, "model", FIGURES, 512), 0, "1.0e-06 of the largest logit, 4 (same: up to 1e-04)"),
        (Verdict(FLAGS, "twin", FIGURES, 512, ["no flag for x"]), 0, "no flag for x"),
        (
            Verdict(DIFFERS, "model", FIGURES | {"largest_difference": float("nan")}, 512),
            1,
            "nan of the largest logit",
        ),
        (Verdict(NOT_PROVED, notes=["needs megatron-core 0.19"]), 3, "needs megatron-core 0.19"),
    ],
)
def test_verdict_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdict: Verdict, code: int, words: str):
    asked = {}
    monkeypatch.setattr(
        subcommand, "verify", lambda out, hf_model, **options: asked.update(options, hf_model=hf_model) or verdict
    )
    result = CliRunner().invoke(main, ["verify", str(tmp_path), "--hf-model", "m", "--twin"])
    assert result.exit_code == code and words in result.stdout and result.stdout.startswith(verdict.verdict)
    assert asked == {"hf_model": "m", "twin": True, "trust_remote_code": False}
    document = CliRunner().invoke(main, ["verify", str(tmp_path), "--json"])
    assert json.loads(document.stdout)["verdict"] == verdict.verdict and document.exit_code == code


def test_path_without_checkpoint_is_an_error(tmp_path: Path):
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "none")])
    assert result.exit_code == 1 and "holds no checkpoint" in result.stderr


def test_verify_imports_no_torch(tmp_path: Path):
    code = "import sys\nfrom megatron.bridge.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "verify", str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
