# SPDX-License-Identifier: Apache-2.0
"""What the session megatron_versions says of a Megatron Core: which one it is, and what came of it."""

from pathlib import Path

import page
import pytest
import torch
import versions
import weights


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the page that is written, with a block for results."""
    path = tmp_path / "page.md"
    path.write_text(f"text\n<!-- {versions.BLOCK}:begin -->\n<!-- {versions.BLOCK}:end -->\n", "utf-8")
    monkeypatch.setattr(versions, "PAGE", path)
    return path


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a megatron-core of PyPI without a training loop."""
    monkeypatch.setattr(versions, "unpacked", lambda version: tmp_path / "core")
    (tmp_path / "core" / "megatron" / "core").mkdir(parents=True)
    return tmp_path / "core"


def result(written: Path) -> list[str]:
    return page.block_of(written.read_text("utf-8"), versions.BLOCK).splitlines()[-1].split(" | ")


def test_a_failure_is_written_without_this_machine_s_folders(
    written: Path, core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*_: Path) -> None:
        raise versions.Failed(f"{tmp_path}/release/common.pt is not there\n  its log: {tmp_path}/log")

    monkeypatch.setattr(versions, "loads", fail)
    assert not versions.read(tmp_path, "0.15.3")
    assert result(written)[:2] == ["| 0.15.3", "fails: …/release/common.pt is not there"]
    assert f"its log: {tmp_path}/log" in capsys.readouterr().err


def test_only_a_core_with_a_loop_trains(written: Path, core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "loads", lambda *_: None)
    monkeypatch.setattr(versions, "reference", lambda _: {1: 6.0, 2: 5.0, 3: 4.0})
    found = {1: 6.0, 2: 5.0, 3: 4.00001}
    monkeypatch.setattr(versions, "losses", lambda *_: found)
    assert versions.read(tmp_path, "0.16.1")
    assert result(written)[:2] == ["| 0.16.1", "loads"]
    (core / "megatron" / "training").mkdir()
    assert versions.read(tmp_path, "0.17.1")
    assert result(written)[:2] == ["| 0.17.1", "loads; loss 6.000 → 4.000"]
    found[3] = 4.001
    assert not versions.read(tmp_path, "0.18.2")
    assert result(written)[1].startswith("loads; fails: the losses are [6.0, 5.0, 4.001], those of 0.19.2 [6.0, 5.0,")


def test_another_megatron_core_than_the_one_that_is_meant_is_noticed(tmp_path: Path):
    (tmp_path / "log.txt").write_text("a warning\nMegatron Core 0.19.2 of /elsewhere\n", "utf-8")
    with pytest.raises(versions.Failed, match="found Megatron Core in /elsewhere, expected it in "):
        versions._check_origin(tmp_path / "log.txt", tmp_path / "core")


def test_a_checkout_is_named_by_its_version(tmp_path: Path):
    facts = versions._package_info(tmp_path)
    facts.parent.mkdir(parents=True)
    facts.write_text("MAJOR = 0\nMINOR = 16\nPATCH = 0\nPRE_RELEASE = 'rc0'\n", "utf-8")
    assert versions._name(tmp_path) == "0.16.0rc0 of a checkout, commit unknown"


def test_a_weight_that_differs_in_anything_is_named():
    own = {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2, 3), "c": torch.ones(2), "d": torch.ones(1)}
    other = {"a": torch.tensor([-0.0, 1.0]), "b": torch.ones(3, 2), "c": torch.ones(2).double(), "e": torch.ones(1)}
    assert weights.differing(own, dict(own)) == []
    assert weights.differing(own, other) == ["a", "b", "c", "d", "e"]
