# SPDX-License-Identifier: Apache-2.0
"""The build: upstream's wheel, the stack over it, packed as a wheel of our own; and the PEP 517 hooks that call it."""

import calendar
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from packaging.metadata import Metadata
from wheel.wheelfile import WheelFile

from fork import requirements, stack
from fork.change import Change
from fork.errors import ForkError
from fork.upstream import LATEST, Upstream, obtain


RELEASE = 2
"""Counts the fork builds over one upstream version."""

UPSTREAM_URL = "https://github.com/NVIDIA-NeMo/Megatron-Bridge"
WHEEL_VARIABLE = "MEGATRON_BRIDGE_UPSTREAM_WHEEL"


def version(upstream: Upstream) -> str:
    """Returns the fork's version over `upstream`."""
    return f"{upstream.version}+release.{RELEASE}"


def stem(upstream: Upstream) -> str:
    """Returns what the names of files made over `upstream` begin with."""
    return f"megatron_bridge-{version(upstream)}"


def build(
    folder: Path,
    upstream: Upstream = LATEST,
    given: Path | None = None,
    changes: Sequence[Change] | None = None,
    modules: Path = stack.MODULES,
) -> Path:
    """Builds the patched wheel into `folder` and returns its path; two builds of the same sources are the same bytes.

    Args:
        folder: where the wheel goes; made if need be. Nothing is left there when the build fails.
        upstream: the upstream version to build on.
        given: upstream's wheel, for a host without network.
        changes: the stack; that of changes/ unless it is given.
        modules: the folder that the new modules are in.

    Raises:
        ForkError: upstream's wheel can't be had, or an edit doesn't find its place.
    """
    target = folder / f"{stem(upstream)}-py3-none-any.whl"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            packed = Path(scratch, target.name)
            _make(packed, upstream, obtain(upstream, given), stack.load() if changes is None else changes, modules)
            return publish(packed, folder)
    except ForkError:
        # A wheel of an earlier build has the same name and would be taken for this one.
        if target.is_file():
            target.unlink()
        raise


def _make(target: Path, upstream: Upstream, source: Path, changes: Sequence[Change], modules: Path) -> None:
    """Makes the patched wheel `target` from upstream's wheel `source`."""
    root = target.parent / "wheel"
    with zipfile.ZipFile(source) as wheel:
        wheel.extractall(root)
        made = max(entry.date_time for entry in wheel.infolist())
    touched = stack.apply(changes, root, modules, pristine=True)
    _mark(root, changes, touched, upstream)
    info = root / f"{stem(upstream)}.dist-info"
    (root / f"megatron_bridge-{upstream.version}.dist-info").rename(info)
    (info / "RECORD").unlink()
    _write_notice(info / "licenses" / "NOTICE", changes, touched, upstream)
    edit_metadata(info / "METADATA", changes, upstream)
    _edit_generator(info / "WHEEL")
    _pack(root, target, made)


def _mark(root: Path, changes: Sequence[Change], touched: dict[str, list[str]], upstream: Upstream) -> None:
    """Gives each modified file the prominent notice that section 4(b) of Apache-2.0 asks for."""
    package = stack.find_package(root)
    new = {module for change in changes for module in change.modules}
    for path, names in touched.items():
        if path not in new:
            line = f"# Modified from megatron-bridge {upstream.version} (changes: {', '.join(names)}); see NOTICE.\n"
            (package / path).write_text(line + (package / path).read_text("utf-8"), "utf-8")


def _write_notice(path: Path, changes: Sequence[Change], touched: dict[str, list[str]], upstream: Upstream) -> None:
    """Says which files are modified or new, and by which change."""
    new = {module for change in changes for module in change.modules}
    lines = [(stack.REPOSITORY / "NOTICE").read_text("utf-8")]
    lines += [f"This wheel is megatron-bridge {upstream.version} with the following changes."]
    lines += ["Report problems with it to the project that built it, and not to NVIDIA.", ""]
    for change in changes:
        if not change.in_wheel:
            continue
        lines += [f"{change.name}: {' '.join(change.why.split())}"]
        for file, names in sorted(touched.items()):
            if change.name in names:
                lines += [f"    {'new     ' if file in new else 'modified'} megatron/bridge/{file}"]
        if change.requirements:
            lines += ["    modified METADATA (requirements)"]
        if change.scripts:
            lines += ["    modified entry_points.txt (console scripts)"]
        lines += [""]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), "utf-8")


def edit_metadata(path: Path, changes: Sequence[Change], upstream: Upstream) -> None:
    """Rewrites version, requirements, licence files, maintainers and URLs in METADATA; the rest stays upstream's.

    The URLs are where people report bugs, so they are those of this project, and upstream's is called so.
    """
    header, blank, description = path.read_text("utf-8").partition("\n\n")
    asked, extras, kept = [], [], []
    for line in header.split("\n"):
        name, _, value = line.partition(": ")
        if name == "Requires-Dist":
            asked.append(value)
        elif name == "Provides-Extra":
            extras.append(value)
        elif name not in ("Maintainer-email", "Project-URL"):
            kept.append(f"Version: {version(upstream)}" if name == "Version" else line)
    edits = [edit for change in changes for edit in change.requirements]
    asked = requirements.edit(asked, edits, upstream.version)
    extras += [extra for extra in requirements.extras(asked) if extra not in extras]
    urls = tomllib.loads((stack.REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    kept += [f"Project-URL: {label}, {url}" for label, url in {**urls, "Upstream": UPSTREAM_URL}.items()]
    kept += ["License-File: NOTICE", *(f"Provides-Extra: {extra}" for extra in extras)]
    kept += [f"Requires-Dist: {each}" for each in asked]
    text = "\n".join(kept) + blank + description
    Metadata.from_email(text)
    path.write_text(text, "utf-8")


def _edit_generator(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    lines = ["Generator: fork.backend" if line.startswith("Generator: ") else line for line in lines]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _pack(root: Path, target: Path, made: tuple[int, ...]) -> None:
    """Packs the folder `root`; `made` is the time of every entry where SOURCE_DATE_EPOCH doesn't say another.

    It is when upstream made its wheel, not when the commit was: a build from an sdist or without git is the same.
    """
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or str(calendar.timegm(made))
    # WheelFile sorts the entries and writes RECORD. Stored: deflated bytes would depend on the machine's zlib.
    with mock.patch.dict(os.environ, SOURCE_DATE_EPOCH=epoch), WheelFile(target, "w", zipfile.ZIP_STORED) as wheel:
        wheel.write_files(str(root))


def publish(packed: Path, folder: Path) -> Path:
    """Puts the finished file into `folder`, whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as near:
            return Path(shutil.copyfile(packed, Path(near, packed.name))).replace(folder / packed.name)
    except OSError as error:
        raise ForkError(f"can't write to {folder}: {error}; give another folder") from None


# --- PEP 517 ---------------------------------------------------------------------------------------------------------


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel; `--config-settings upstream-wheel=PATH` or the environment gives upstream's wheel."""
    given = (config_settings or {}).get("upstream-wheel") or os.environ.get(WHEEL_VARIABLE)
    try:
        return build(Path(wheel_directory), given=Path(given) if given else None).name
    except ForkError as error:
        # A frontend shows what the backend printed; a traceback would bury the one line that helps.
        raise SystemExit(f"error: {error}") from None


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    """Packs what a build of the wheel needs: the stack, the new modules and the machinery, nothing of upstream."""
    base = stem(LATEST)
    files = [stack.REPOSITORY / name for name in ("LICENSE", "NOTICE", "README.md", "pyproject.toml")]
    for folder in ("changes", "fork", "src"):
        files += sorted(path for path in (stack.REPOSITORY / folder).rglob("*.py"))
    about = f"Metadata-Version: 2.4\nName: megatron-bridge\nVersion: {version(LATEST)}\nDynamic: Requires-Dist\n"
    target = Path(sdist_directory, f"{base}.tar.gz")
    with gzip.GzipFile(target, "wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        contents = {path.relative_to(stack.REPOSITORY).as_posix(): path.read_bytes() for path in files}
        for name, data in {**contents, "PKG-INFO": about.encode()}.items():
            entry = tarfile.TarInfo(f"{base}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target.name
