# SPDX-License-Identifier: Apache-2.0
"""The subcommand `export` refuses what it can't do before it imports anything."""

from pathlib import Path

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
    assert "can't be loaded" in export(tmp_path / "c", tmp_path / "hf")
    assert not list(tmp_path.iterdir())
