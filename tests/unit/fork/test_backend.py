# SPDX-License-Identifier: Apache-2.0
"""The wheel that a build packs: what it holds, that it is the same bytes each time, that a failure leaves nothing."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.metadata import Metadata

from fork import backend, stack
from fork.__main__ import main
from fork.change import Change
from fork.edits import File, add_parameter, insert_first
from fork.errors import ForkError
from fork.upstream import LATEST, Upstream


INFO = "megatron_bridge-1.2.3+release.2.dist-info"


@pytest.fixture
def build(upstream: Upstream, upstream_wheel: Path, change: Change, modules: Path):
    """Builds the made-up wheel into a folder."""

    def build(folder: Path, **changed) -> Path:
        return backend.build(folder, upstream, upstream_wheel, [replace(change, **changed)], modules)

    return build


@pytest.fixture
def wheel(build, tmp_path: Path) -> zipfile.ZipFile:
    with zipfile.ZipFile(build(tmp_path / "dist")) as wheel:
        yield wheel


def test_wheel_has_the_name_that_pip_expects(build, tmp_path: Path):
    assert build(tmp_path / "dist") == tmp_path / "dist" / "megatron_bridge-1.2.3+release.2-py3-none-any.whl"
    assert len(list((tmp_path / "dist").iterdir())) == 1


def test_record_lists_every_file_with_its_hash(wheel: zipfile.ZipFile):
    rows = {name: (digest, size) for name, digest, size in csv.reader(wheel.read(f"{INFO}/RECORD").decode().split())}
    assert sorted(rows) == sorted(wheel.namelist())
    assert rows.pop(f"{INFO}/RECORD") == ("", "")
    for name, (digest, size) in rows.items():
        data = wheel.read(name)
        assert int(size) == len(data)
        encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert digest == f"sha256={encoded}"


def test_metadata_has_our_version_and_requirements(wheel: zipfile.ZipFile):
    metadata = Metadata.from_email(wheel.read(f"{INFO}/METADATA"))
    assert str(metadata.version) == "1.2.3+release.2"
    assert [str(each) for each in metadata.requires_dist] == [
        "torch",
        'for-gpus==1.0; extra == "cuda"',
        'librosa; extra == "audio"',
    ]
    assert metadata.provides_extra == ["audio", "cuda"]
    assert metadata.license_files == ["LICENSE", "NOTICE"]
    assert metadata.description == "# Description\n\nVersion: not a field\n"


def test_metadata_sends_bug_reports_to_this_project(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nIssues = "https://example.org/issues"\n')
    (tmp_path / "NOTICE").write_text("Notice.\n")
    monkeypatch.setattr(stack, "REPOSITORY", tmp_path)
    with zipfile.ZipFile(build(tmp_path / "dist")) as wheel:
        metadata = Metadata.from_email(wheel.read(f"{INFO}/METADATA"))
    assert metadata.project_urls == {"Issues": "https://example.org/issues", "Upstream": backend.UPSTREAM_URL}
    assert (metadata.author_email, metadata.maintainer_email) == ("Somebody <author@example.org>", None)


def test_edited_files_are_formatted_as_upstream_formats(build, tmp_path: Path):
    edits = [insert_first("save", "if path:\n    import sys\n    sys.exit(path)\n")]
    with zipfile.ZipFile(build(tmp_path / "dist", edits=[File("saving.py", edits)])) as wheel:
        text = wheel.read("megatron/bridge/saving.py").decode().partition("\n")[2]
    assert text == "def save(path):\n    if path:\n        import sys\n\n        sys.exit(path)\n    return path\n"


def test_licence_and_entry_points_are_upstreams(wheel: zipfile.ZipFile, upstream_files: dict[str, str]):
    for name in ("licenses/LICENSE", "entry_points.txt"):
        expected = upstream_files[f"megatron_bridge-1.2.3.dist-info/{name}"]
        assert wheel.read(f"{INFO}/{name}").decode() == expected


def test_notice_says_what_is_modified_and_why(wheel: zipfile.ZipFile):
    notice = wheel.read(f"{INFO}/licenses/NOTICE").decode()
    assert "This wheel is megatron-bridge 1.2.3 with the following changes." in notice
    assert "example: Because it is an example." in notice
    assert "    modified megatron/bridge/saving.py\n" in notice
    assert "    new      megatron/bridge/new/extra.py\n" in notice
    assert "    modified METADATA (requirements)\n" in notice


def test_modified_files_say_so_and_no_others(wheel: zipfile.ZipFile, upstream_files: dict[str, str]):
    line = "# Modified from megatron-bridge 1.2.3 (changes: example); see NOTICE."
    assert wheel.read("megatron/bridge/saving.py").decode().splitlines()[0] == line
    assert wheel.read("megatron/bridge/new/extra.py") == b"ANSWER = 42\n"
    name = "megatron/bridge/package_info.py"
    assert wheel.read(name).decode() == upstream_files[name]


def test_two_builds_are_the_same_bytes(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    one = build(tmp_path / "one")
    previous = os.umask(0o077)
    try:
        two = build(tmp_path / "two")
    finally:
        os.umask(previous)
    assert one.read_bytes() == two.read_bytes()


def test_source_date_epoch_is_the_time_of_every_entry(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    with zipfile.ZipFile(build(tmp_path / "dist")) as wheel:
        assert {entry.date_time for entry in wheel.infolist()} == {(2001, 9, 9, 1, 46, 40)}
    assert os.environ["SOURCE_DATE_EPOCH"] == "1000000000"


@pytest.mark.parametrize(
    "wrong",
    [
        {"edits": [File("saving.py", [add_parameter("gone", "a=1")])]},
        {"edits": [File("gone.py", [])]},
        {"modules": ["gone.py"]},
        {"requirements": [backend.requirements.move("gone", "cuda")]},
    ],
    ids=["edit", "file", "module", "requirement"],
)
def test_failure_leaves_nothing(build, tmp_path: Path, wrong: dict):
    with pytest.raises(ForkError, match="gone"):
        build(tmp_path / "dist", **wrong)
    assert not (tmp_path / "dist").exists()


def test_failure_leaves_no_wheel_of_before_under_its_name(build, tmp_path: Path):
    build(tmp_path / "dist")
    (tmp_path / "dist" / "other").write_text("kept")
    with pytest.raises(ForkError):
        build(tmp_path / "dist", modules=["gone.py"])
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["other"]


def test_folder_that_is_a_file_is_refused(build, tmp_path: Path):
    (tmp_path / "dist").write_text("")
    with pytest.raises(ForkError, match="can't write to .*dist: .*; give another folder"):
        build(tmp_path / "dist")


def test_pip_installs_the_wheel(build, tmp_path: Path):
    wheel = build(tmp_path / "dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path / "t",
    ]
    subprocess.run([*command, wheel], check=True)
    assert (tmp_path / "t" / "megatron" / "bridge" / "new" / "extra.py").is_file()


def test_hook_tells_errors_in_one_line(tmp_path: Path):
    hook = (
        f"from fork import backend; backend.build_wheel({str(tmp_path / 'dist')!r}, {{'upstream-wheel': '/gone.whl'}})"
    )
    done = subprocess.run([sys.executable, "-c", hook], cwd=stack.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: upstream wheel /gone.whl is not a file; give ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "dist").exists()


def test_hook_takes_the_wheel_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(backend.WHEEL_VARIABLE, "/gone.whl")
    with pytest.raises(SystemExit, match="error: upstream wheel /gone.whl is not a file"):
        backend.build_wheel(str(tmp_path))


def test_command_line_tells_errors_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, ["build", "--out", str(tmp_path / "dist"), "--upstream-wheel", "/gone.whl"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: upstream wheel /gone.whl is not a file; give ")
    assert result.output.count("\n") == 1
    assert not (tmp_path / "dist").exists()


def test_sdist_holds_the_stack_and_nothing_of_upstream(tmp_path: Path):
    name = backend.build_sdist(str(tmp_path))
    again = tmp_path / "again"
    again.mkdir()
    assert (tmp_path / name).read_bytes() == (again / backend.build_sdist(str(again))).read_bytes()
    base = f"megatron_bridge-{backend.version(LATEST)}"
    with tarfile.open(tmp_path / name) as archive:
        names = {each.removeprefix(f"{base}/") for each in archive.getnames()}
        metadata = Metadata.from_email(archive.extractfile(f"{base}/PKG-INFO").read())
    assert name == f"{base}.tar.gz"
    assert {"PKG-INFO", "pyproject.toml", "LICENSE", "NOTICE", "fork/backend.py"} <= names
    changes = stack.load()
    assert {
        os.path.normpath(f"src/megatron/bridge/{module}") for change in changes for module in change.modules
    } <= names
    assert str(metadata.version) == backend.version(LATEST)
