# SPDX-License-Identifier: Apache-2.0
"""The offline kit: everything that the functional tests need on a host with Python and torch and without network."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from fork.errors import ForkError
from fork.kit import transformer_engine
from fork.kit.packages import needed
from fork.stack import REPOSITORY


HERE = Path(__file__).parent
CARRIED = ("tests/conftest.py", "tests/functional/*", "benchmarks/*.py", "pyproject.toml", "LICENSE", "NOTICE")
"""The files of this repository in the kit: the functional tests, and what they and pytest need."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def make(
    folder: Path,
    wheel: Path,
    tools: Sequence[str],
    part_size: int | None = None,
    with_transformer_engine: bool = False,
    families: Sequence[str] = (),
) -> dict:
    """Makes the kit in `folder`, completely or not at all, and returns its manifest.

    Args:
        folder: the folder of the kit; an older kit there is replaced.
        wheel: the fork build.
        tools: the requirements of the tests' tools.
        part_size: the most bytes of a part of the payload; None for one part.
        with_transformer_engine: whether to add Transformer Engine for CUDA.
        families: the families of the release checkpoints for the visit's gate; default: all.

    Raises:
        ForkError: the wheel doesn't exist, a package can't be downloaded, or `folder` holds something else.
    """
    if not wheel.is_file():
        raise ForkError(f"{wheel} doesn't exist; build it with nox -s build, or pass another with --wheel")
    _check(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kit-", dir=folder.parent) as scratch:
        payload, made = Path(scratch, "payload"), Path(scratch, "kit")
        imported = transformer_engine.IMPORTED if with_transformer_engine else []
        gather(payload, wheel, needed([*tools, *imported]), with_transformer_engine)
        write_releases(payload / "dist" / "carried", families)
        manifest = pack(payload, made, part_size, transformer_engine.COMPILED_FOR if with_transformer_engine else None)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return manifest


def _check(folder: Path) -> None:
    if folder.exists() and not (folder / "manifest.json").is_file() and any(folder.iterdir()):
        raise ForkError(f"{folder} is not empty and not a kit; pass another folder with --out")
    kept = [name for name in ("results", "environment") if (folder / name).exists()]
    if kept:
        raise ForkError(f"{folder / kept[0]} is from a run of the kit; move it, or pass another folder with --out")


def gather(payload: Path, wheel: Path, packages: Iterable[str], with_transformer_engine: bool = False) -> None:
    """Gathers the payload: the fork build, the wheels of other packages as published, and the tests."""
    pinned = [f"{name}=={metadata.version(name)}" for name in packages]
    (payload / "wheels").mkdir(parents=True)
    compress(wheel, payload / "wheels" / wheel.name)
    if with_transformer_engine:
        pinned += transformer_engine.REQUIREMENTS
        shutil.copy(transformer_engine.compiled(), payload / "wheels")
    get_wheels(pinned, payload / "wheels")
    for pattern in CARRIED:
        for path in filter(Path.is_file, sorted(REPOSITORY.glob(pattern))):
            target = payload / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def write_releases(folder: Path, families: Sequence[str] = ()) -> None:
    """Writes the tiny release checkpoints for the visit's gate, without Transformer Engine. Default: all families."""
    command = [sys.executable, str(REPOSITORY / "tests" / "functional" / "gate.py"), "write", str(folder)]
    command += [f"--family={name}" for name in families]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})
    if done.returncode:
        raise ForkError(
            f"can't write the gate's release checkpoints: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )


def compress(wheel: Path, target: Path) -> None:
    """Copies the fork build and compresses its files, which are stored uncompressed: 2 MB instead of 9."""
    with zipfile.ZipFile(wheel) as stored, zipfile.ZipFile(target, "w") as compressed:
        for info in stored.infolist():
            compressed.writestr(info, stored.read(info), zipfile.ZIP_DEFLATED)


def get_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Gets wheels with pip and the user's own configuration. pip builds packages that have no wheel."""
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", *quiet, "wheel", "--no-deps", "--wheel-dir", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = re.findall(r"^ *ERROR: (.*)", done.stderr, re.MULTILINE) or ["no error"]
        raise ForkError(f"can't get the kit's wheels: pip says {errors[-1]!r}; check the network and pip's index")


def pack(payload: Path, folder: Path, part_size: int | None = None, compiled_for: dict | None = None) -> dict:
    """Packs `payload` into parts in `folder`, adds the manifest and the host's scripts, and returns the manifest.

    Args:
        payload: the folder to pack.
        folder: the folder of the kit.
        part_size: the most bytes of a part; None for one part.
        compiled_for: the versions that the kit's Transformer Engine was compiled for; None without one.
    """
    folder.mkdir(parents=True)
    # Of a stream, tarfile calls `write` and nothing else.
    with Parts(folder, part_size) as parts, tarfile.open(fileobj=parts, mode="w|") as archive:  # type: ignore[call-overload]
        for path in sorted(filter(Path.is_file, payload.rglob("*"))):
            archive.add(path, path.relative_to(payload).as_posix(), filter=_anonymous)
    manifest = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "transformer_engine": compiled_for,
        "parts": [entry(path, folder) for path in parts.paths],
        "files": [entry(path, payload) for path in sorted(filter(Path.is_file, payload.rglob("*")))],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name in ("run.sh", "install.py"):
        shutil.copy(HERE / name, folder)
    return manifest


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def entry(path: Path, folder: Path) -> dict:
    """Returns the manifest's entry of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": digest}


class Parts:
    """A file that is split into parts of a fixed size; `cat` joins them again."""

    def __init__(self, folder: Path, size: int | None) -> None:
        self.folder = folder
        self.size = size
        self.paths: list[Path] = []
        self.file: io.BufferedWriter | None = None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()

    def write(self, data: bytes) -> int:
        """Write, and start another part when this one is full."""
        rest = memoryview(data)
        while rest:
            room = self.size - self.file.tell() if self.file and self.size else len(rest)
            if self.file is None or room == 0:
                self.file = self._next()
                room = self.size or len(rest)
            self.file.write(rest[:room])
            rest = rest[room:]
        return len(data)

    def _next(self) -> io.BufferedWriter:
        if self.file:
            self.file.close()
        name = f"payload.tar.{len(self.paths):02}" if self.size else "payload.tar"
        self.paths.append(self.folder / name)
        return self.paths[-1].open("wb")


def parse_size(text: str) -> int:
    """Returns a number of bytes from a text such as `60M`. K, M, and G are powers of 1024.

    Raises:
        ForkError: the text is not a size.
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if not found or not int(found[1]):
        raise ForkError(f"found the size {text!r}, expected a number of bytes, or for example 60M")
    return int(found[1]) * UNITS[found[2]]


def report(manifest: dict) -> str:
    """Returns the sizes of the largest files and of the whole kit."""
    heaviest = sorted(manifest["files"], key=lambda each: -each["size"])[:8]
    lines = [f"{each['size'] / (1 << 20):7.1f} MiB  {Path(each['file']).name}" for each in heaviest]
    parts = manifest["parts"]
    whole = sum(each["size"] for each in parts)
    lines.append(
        f"{whole / (1 << 20):7.1f} MiB  in {len(parts)} part{'s' * (len(parts) > 1)}, {len(manifest['files'])} files"
    )
    return "\n".join(lines)
