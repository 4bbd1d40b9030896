# SPDX-License-Identifier: Apache-2.0
"""Unit tests of what an import records."""

import logging
from pathlib import Path

import pytest
import yaml

from megatron.bridge.release_checkpoint import proof
from megatron.bridge.release_checkpoint.proof import Proof


CONFIG = "model:\n  num_layers: 2\n  note: 'proof:'\n"
logger = logging.getLogger(__name__)


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    (tmp_path / "run_config.yaml").write_text(CONFIG)
    return tmp_path


def test_what_is_recorded_comes_back(payload: Path) -> None:
    proof.record(payload, left_out=["a 'b': é"], verdict={"verdict": "same", "apart": 1e-6})
    proof.record(payload, unproved=["x"])
    assert proof.recorded(payload) == Proof(["a 'b': é"], ["x"], {"verdict": "same", "apart": 1e-6})
    text = (payload / "run_config.yaml").read_text()
    assert text.startswith(CONFIG) and text.count("\nproof:\n") == 1
    assert yaml.safe_load(text)["proof"]["left_out"] == ["a 'b': é"]
    assert [path.name for path in payload.iterdir()] == ["run_config.yaml"]


def test_nothing_is_evaluated(payload: Path) -> None:
    proof.record(payload, left_out=["${oc.env:HOME}"])
    assert "${" not in (payload / "run_config.yaml").read_text()


@pytest.mark.parametrize(
    "section",
    ["proof:\n  left_out: [1, {}]\n", "proof:\n  left_out: [\n", "proof: 3\n", f"proof:\n  verdict: {'[' * 9999}\n"],
)
def test_nonsense_is_no_proof(payload: Path, section: str) -> None:
    (payload / "run_config.yaml").write_text(CONFIG + section)
    assert proof.recorded(payload) == Proof()


def test_no_run_config_has_no_proof(tmp_path: Path) -> None:
    assert proof.recorded(tmp_path) == Proof()


def test_an_import_records_each_line_once(payload: Path, caplog: pytest.LogCaptureFixture) -> None:
    @proof.of_import
    def import_ckpt() -> None:
        for _ in range(2):
            proof.warn(logger, "llama: 2 tensors are left out", left_out="2 tensors")
        proof.warn(logger, "family", unproved="family")
        proof.record_import(payload)

    import_ckpt()
    assert caplog.messages == ["llama: 2 tensors are left out", "family"]
    assert proof.recorded(payload) == Proof(["2 tensors"], ["family"])
    assert proof.noted() is None


def test_an_import_with_nothing_to_say_says_so(payload: Path) -> None:
    proof.record_import(payload)
    assert not proof.is_recorded(payload)
    proof.of_import(lambda: proof.record_import(payload))()
    assert proof.is_recorded(payload) and proof.recorded(payload) == Proof()
