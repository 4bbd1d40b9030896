# SPDX-License-Identifier: Apache-2.0
"""The kit is cut and put together again; what is missing, damaged or in the way is named, and nothing is lost."""

import json
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from wheel.wheelfile import WheelFile

from fork import kit
from fork.errors import ForkError
from fork.kit import install, packages


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    folder = tmp_path / "payload"
    (folder / "wheels").mkdir(parents=True)
    for index, size in enumerate([0, 1, 5000, 30000]):
        (folder / "wheels" / f"package{index}.whl").write_bytes(bytes([65 + index]) * size)
    return folder


@pytest.fixture
def made(payload: Path, tmp_path: Path) -> Path:
    kit.pack(payload, tmp_path / "kit", 10240)
    return tmp_path / "kit"


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("size", [None, 1000, 10240, 1 << 20])
def test_parts_give_the_payload_again(payload: Path, tmp_path: Path, size: int | None) -> None:
    manifest = kit.pack(payload, tmp_path / "kit", size)
    sizes = [part["size"] for part in manifest["parts"]]
    if size:
        assert set(sizes[:-1]) <= {size} and sizes[-1] <= size
    else:
        assert len(sizes) == 1
    install.unpack(install.check_parts(tmp_path / "kit", manifest), tmp_path / "out", manifest)
    assert len(manifest["files"]) == 4
    for entry in manifest["files"]:
        assert (tmp_path / "out" / entry["file"]).read_bytes() == (payload / entry["file"]).read_bytes()
        assert entry["size"] == (payload / entry["file"]).stat().st_size


def test_missing_parts_are_named(made: Path) -> None:
    (made / "payload.tar.01").unlink()
    (made / "payload.tar.03").unlink()
    with pytest.raises(
        install.KitError, match=r"^missing payload\.tar\.01, payload\.tar\.03 of 5 parts: copy the missing parts to"
    ):
        install.check_parts(made, manifest_of(made))


def test_a_part_that_was_cut_off_is_named(made: Path) -> None:
    part = made / "payload.tar.02"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(install.KitError, match=r"^damaged payload\.tar\.02: copy the damaged parts to .* again$"):
        install.check_parts(made, manifest_of(made))


def test_another_python_is_refused(made: Path) -> None:
    with pytest.raises(install.KitError, match=r"is Python 3\.\d+, and the kit needs Python 3\.99: set PYTHON to a"):
        install.check_host(manifest_of(made) | {"python": "3.99"})


def test_a_host_without_torch_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(install.KitError, match="has no torch: set PYTHON to the Python that has this host's torch"):
        install.check_host(manifest_of(made))


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(install.KitError, match="is not empty and not an environment: set KIT_ENVIRONMENT"):
        install.clear(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("of_host", "taken"),
    [(("2.11.0+cu130", "13.0"), 3), (("2.11.0", "12.8"), 1), (("2.12.0", "13.0"), 1), (("2.11.0+rocm7", None), 1)],
)
def test_transformer_engine_goes_with_its_torch_alone(
    payload: Path, monkeypatch: pytest.MonkeyPatch, of_host: tuple[str, str | None], taken: int
) -> None:
    for path in (payload / "wheels").iterdir():
        path.unlink()
    for name in ("transformer_engine-2.whl", "transformer_engine_torch-2.whl", "omegaconf-2.whl"):
        (payload / "wheels" / name).touch()
    monkeypatch.setattr(install, "torch_of_host", lambda: of_host)
    assert len(install.wheels(payload, {"transformer_engine": {"torch": "2.11.0", "cuda": "13"}})) == taken


def test_versions_of_torch_are_read_without_importing_it() -> None:
    import torch

    assert install.torch_of_host() == (str(torch.__version__), torch.version.cuda)


def test_the_host_s_folders_are_those_of_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["script's", str(tmp_path), *sys.path[1:]])
    folders = install.host_folders()
    assert folders[0] == str(tmp_path)
    assert any(folder.endswith("site-packages") for folder in folders)
    assert not any(Path(folder, "os.py").exists() for folder in folders)


def test_closure_leaves_out_what_the_host_brings() -> None:
    found = packages.closure(["megatron-core"])
    assert {"megatron-core", "numpy", "packaging"} <= set(found)
    assert "torch" not in found and "triton" not in found
    assert any(name.startswith("nvidia-") for name in packages.closure(["torch"], through=()))


def test_the_wheel_is_compressed_and_nothing_else_of_it_changes(tmp_path: Path) -> None:
    with WheelFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        for name in ("a.py", "a-1.dist-info/METADATA", "a-1.dist-info/WHEEL"):
            wheel.writestr(zipfile.ZipInfo(name), name * 1000, zipfile.ZIP_STORED)
    (tmp_path / "kit").mkdir()
    kit.compress(tmp_path / "a-1-py3-none-any.whl", tmp_path / "kit" / "a-1-py3-none-any.whl")
    assert (tmp_path / "kit" / "a-1-py3-none-any.whl").stat().st_size < 5000
    with WheelFile(tmp_path / "kit" / "a-1-py3-none-any.whl") as wheel:  # which checks each file against RECORD
        assert wheel.read("a.py") == b"a.py" * 1000


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ForkError, match="^no-such-package is not installed; make the kit with nox -s kit"):
        packages.closure(["no-such-package"])


def test_linked_packages_are_found_and_others_not(tmp_path: Path) -> None:
    packages.link(["megatron-core", "packaging"], tmp_path)
    assert (tmp_path / "packaging" / "version.py").is_file()
    # Folders that packages share hold this one's files alone.
    assert (tmp_path / "megatron" / "core" / "__init__.py").is_file()
    assert not (tmp_path / "megatron" / "bridge").exists()
    (found,) = metadata.distributions(name="megatron-core", path=[str(tmp_path)])
    assert found.version == metadata.version("megatron-core")


@pytest.mark.parametrize(("text", "expected"), [("60M", 60 << 20), ("1g", 1 << 30), ("512k", 512 << 10), ("77", 77)])
def test_sizes(text: str, expected: int) -> None:
    assert kit.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "0", "60 MB", "-1", "1.5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ForkError, match="expected a number of bytes, or for example 60M"):
        kit.parse_size(text)


def test_nothing_else_in_the_folder_is_overwritten(tmp_path: Path) -> None:
    wheel, folder = tmp_path / "a.whl", tmp_path / "kit"
    wheel.touch()
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(ForkError, match="is not empty and not a kit; pass another folder with --out"):
        kit.make(folder, wheel, [])
    (folder / "manifest.json").touch()
    (folder / "results").mkdir()
    with pytest.raises(ForkError, match="results is from a run of the kit; move it"):
        kit.make(folder, wheel, [])
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "results", "thesis.txt"]


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForkError, match=r"a\.whl doesn't exist; build it with nox -s build"):
        kit.make(tmp_path / "kit", tmp_path / "a.whl", [])
