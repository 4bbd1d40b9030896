# SPDX-License-Identifier: Apache-2.0
"""An export appears whole, leaves what isn't its own, and doesn't mix with another one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.bridge.host import processes
from megatron.bridge.models.hf_pretrained.export_staging import exports_whole
from megatron.bridge.release_checkpoint.files import Staging
from megatron.bridge.release_checkpoint.target import check_space


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {"config.json": "new", "model.safetensors": "new"}
OLD = {
    "config.json": "old",
    "tokenizer.model": "old",
    "model.safetensors.index.json": "old",
    "model-00001-of-00002.safetensors": "old",
}
OWN = {"notes.txt": "mine", "runs/1/log": "mine", ".git/HEAD": "mine"}


def export(target: Path, files: dict[str, str] = NEW, error: BaseException | None = None, **options) -> None:
    @exports_whole
    def export_ckpt(bridge, megatron_path, hf_path):
        write(Path(hf_path), files)
        if error is not None:
            raise error

    bridge = SimpleNamespace(hf_pretrained=SimpleNamespace(model_name_or_path=str(target.parent / "source")))
    export_ckpt(bridge, target.parent / "checkpoint", target, **options)


def test_an_export_appears_whole(tmp_path: Path):
    export(target := tmp_path / "new" / "hf")
    assert contents(tmp_path / "new") == {f"hf/{name}": text for name, text in NEW.items()}
    target.chmod(0o750)
    export(target, overwrite=True)
    assert target.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("over", [False, True])
def test_one_that_fails_leaves_what_was_there(tmp_path: Path, error, over):
    if over:
        write(tmp_path / "hf", OLD | OWN)
    with pytest.raises(type(error)):
        export(tmp_path / "hf", error=error, overwrite=over)
    assert contents(tmp_path) == ({f"hf/{name}": text for name, text in (OLD | OWN).items()} if over else {})


def test_one_that_fails_says_so_before_its_folder_goes(tmp_path: Path, monkeypatch):
    """Another rank that writes there would fail, too, and say something else."""
    seen = []
    monkeypatch.setattr(processes, "has_to_say", lambda error: seen.append((str(error), contents(tmp_path))))
    with pytest.raises(OSError, match="full"):
        export(tmp_path / "hf", error=OSError("full"))
    ((error, there),) = seen
    assert error == "full" and len(there) > 1 and contents(tmp_path) == {}


def test_what_an_export_does_not_write_stays_other_than_weights(tmp_path: Path):
    write(tmp_path / "hf", OLD | OWN)
    (tmp_path / "hf/link").symlink_to("gone")
    export(tmp_path / "hf")
    assert contents(tmp_path / "hf") == NEW | OWN | {"tokenizer.model": "old"}
    export(tmp_path / "hf", overwrite=True)
    assert contents(tmp_path / "hf") == NEW | OWN and (tmp_path / "hf/link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "hf")
    export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "elsewhere/hf") == NEW


def refused(target: Path, **options) -> str:
    before = contents(target.parent)
    with pytest.raises(OSError) as caught:
        export(target, **options)
    assert contents(target.parent) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_targets_that_are_refused(tmp_path: Path, monkeypatch):
    write(tmp_path, {"file": "mine", "full/notes.txt": "mine", "source/config.json": "{}", "checkpoint/.metadata": ""})
    assert "is a file, expected a directory" in refused(tmp_path / "file")
    assert "exists, expected no such path, or an empty folder" in refused(tmp_path / "full", overwrite=False)
    assert "no Hugging Face model that an export could replace" in refused(tmp_path / "full", overwrite=True)
    assert "is the model that was imported" in refused(tmp_path / "source", overwrite=True)
    assert "holds the checkpoint that is exported" in refused(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path / "full")
    assert "is the current folder, which an export can't replace" in refused(Path("."))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "is not writable" in refused(tmp_path / "hf")


def test_the_second_of_two_exports_is_refused(tmp_path: Path):
    first = Staging(tmp_path / "hf")
    first.open()
    assert "another process is writing to" in refused(tmp_path / "hf")
    first.close()
    write(other := tmp_path / "hf.incomplete", OWN)
    export(tmp_path / "hf", overwrite=False)
    assert contents(other) == OWN and contents(tmp_path / "hf") == NEW


def test_an_export_that_another_one_overtakes_is_refused(tmp_path: Path):
    """As where a file system has no locks."""

    class Overtaken(dict):
        def items(self):
            write(tmp_path / "hf", OLD)
            return NEW.items()

    with pytest.raises(FileExistsError, match="exists, expected no such path"):
        export(tmp_path / "hf", Overtaken(), overwrite=False)
    assert contents(tmp_path) == {f"hf/{name}": text for name, text in OLD.items()}


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path):
    check_space(tmp_path / "out" / "hf", 1)
    with pytest.raises(OSError, match="GB left, expected at least 1,000,000.00 GB: free space there"):
        check_space(tmp_path / "out" / "hf", 10**15)
