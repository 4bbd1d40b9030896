# SPDX-License-Identifier: Apache-2.0
"""The subcommand `export` refuses what it can't do before it imports anything."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron.bridge.cli import main


def export(*paths: Path) -> str:
    """Give the error of an export."""
    result = CliRunner().invoke(main, ["export", *map(str, paths)])
    assert result.exit_code == 1
    return result.stderr


def test_a_folder_that_exists_is_refused(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    said = "exists, expected no such path, or an empty folder: pass a different path, or --overwrite (overwrite=True)"
    assert export(tmp_path / "c", tmp_path / "hf") == f"Error: {tmp_path / 'hf'} {said}\n"


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path):
    said = "can't be loaded. There is nothing at this path: import the model, or pass another path\n"
    assert export(tmp_path / "c", tmp_path / "hf") == f"Error: {tmp_path / 'c'} {said}"
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megatron.bridge.cli import export as subcommand
    from megatron.bridge.training.utils import checkpoint_utils

    monkeypatch.setattr(checkpoint_utils, "get_hf_model_id_from_checkpoint", lambda path: str(tmp_path / "gone"))
    with pytest.raises(
        ValueError, match="imported from .*gone, which is no folder here: pass the model with --hf-model"
    ):
        subcommand._imported_from(tmp_path)


def test_an_adapter_is_not_cast_or_divided(tmp_path: Path):
    result = CliRunner().invoke(main, ["export", str(tmp_path / "c"), "hf", "--adapter-only", "--dtype", "float32"])
    assert result.exit_code == 2
    assert "--adapter-only exports the adapters as they are. Drop --dtype and --max-shard-size." in result.stderr
