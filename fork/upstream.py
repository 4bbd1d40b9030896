# SPDX-License-Identifier: Apache-2.0
"""The upstream versions that the stack is laid over, pinned by hash, and how a build gets their wheels."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from packaging.version import Version

from fork.errors import UpstreamError


@dataclass(frozen=True)
class Upstream:
    """A release of megatron-bridge on PyPI.

    Args:
        version: its version there.
        sha256: the hash of its wheel, as hex.
        megatron_core: the version of megatron-core that goes with it, the last one that upstream made it for.
        transformers: the newest version of transformers that its requirements take.
    """

    version: str
    sha256: str
    megatron_core: str
    transformers: str

    @property
    def line(self) -> str:
        """The release as a line of the table below."""
        values = ", ".join(f'"{each}"' for each in (self.version, self.sha256, self.megatron_core, self.transformers))
        return f"        Upstream({values}),\n"

    @property
    def wheel(self) -> str:
        """The file name of the wheel."""
        return f"megatron_bridge-{self.version}-py3-none-any.whl"

    @property
    def megatron_core_range(self) -> str:
        """The versions of megatron-core that the patched wheel asks for, as a specifier."""
        major, minor, _ = Version(self.megatron_core).release
        return f">={self.megatron_core},<{major}.{minor + 1}"


RELEASES = {
    each.version: each
    for each in [
        Upstream("0.3.1", "4d9a9ad679bd927a84f923e5239512d72af7fa47331b749a8f275592c2920616", "0.16.1", "4.57.6"),
        Upstream("0.4.2", "6f132e19fe8e4a88d7acd65e63182a3f6ff4fbd664d85a436cba44da5e621ce3", "0.17.1", "5.3.0"),
        Upstream("0.5.1", "961ad0a3e08678bb7172b9be3356131567e19d9476f3c983fdaa8483be8f5c3b", "0.18.2", "5.8.1"),
        Upstream("0.6.2", "bcb7274ab9327167c345aa24b96b95790ce5090df1945d883bdc41065d5649e2", "0.19.2", "5.12.1"),
    ]
}
"""An upstream version is a line here; the last one is what a build takes unless it is told another."""
LATEST = list(RELEASES.values())[-1]
CACHE = "megatron-bridge-release"


def obtain(upstream: Upstream, given: Path | None = None) -> Path:
    """Returns the path of `upstream`'s wheel, whose hash is the pinned one.

    The wheel that PyPI has, or the mirror that the user's pip is configured for, is kept in the user's cache folder.

    Args:
        upstream: the upstream version.
        given: a wheel that the user has, for a host without network.

    Raises:
        UpstreamError: the wheel can't be had, or is not the pinned one.
    """
    if given is not None:
        return _checked(given, upstream)
    cached = platformdirs.user_cache_path(CACHE) / upstream.sha256 / upstream.wheel
    if not cached.is_file() or _sha256(cached) != upstream.sha256:
        _download(upstream, cached)
    return cached


def _checked(path: Path, upstream: Upstream) -> Path:
    remedy = f"give the wheel of megatron-bridge {upstream.version} from PyPI, {upstream.wheel}"
    if not path.is_file():
        raise UpstreamError(f"upstream wheel {path} is not a file; {remedy}")
    found = _sha256(path)
    if found != upstream.sha256:
        raise UpstreamError(f"upstream wheel {path} has sha256 {found}, expected {upstream.sha256}; {remedy}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(upstream: Upstream, target: Path) -> None:
    """Lets pip, with the user's own configuration, download the wheel to `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _pip_download(upstream, Path(folder))
            _checked(wheel, upstream)
            os.replace(wheel, target)
    except OSError as error:
        raise UpstreamError(f"can't keep the upstream wheel: {error}; set XDG_CACHE_HOME to a folder for it") from None


def _pip_download(upstream: Upstream, folder: Path) -> Path:
    # A hash here lets pip choose, among files of this version on several indexes, the one that is meant.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"megatron-bridge=={upstream.version} --hash=sha256:{upstream.sha256}\n")
    print(f"downloading {upstream.wheel}", file=sys.stderr)
    done = _pip("-vv", "download", "--dest", str(folder), "-r", str(requirements))
    if done.returncode == 0:
        return folder / upstream.wheel
    said = done.stdout + done.stderr
    remedy = f"--upstream-wheel PATH (or MEGATRON_BRIDGE_UPSTREAM_WHEEL) with {upstream.wheel}"
    got = re.search(r"Got\s+([0-9a-f]{64})", said)
    if got:
        raise UpstreamError(
            f"the index has megatron-bridge {upstream.version} with sha256 {got[1]}, expected {upstream.sha256}; "
            f"let pip use PyPI or a true mirror of it, or give {remedy}"
        )
    raise UpstreamError(
        f"can't download megatron-bridge {upstream.version}: pip says {_cause(said)!r}; "
        f"check the network and pip's index, or give {remedy}"
    )


def find(requirement: str) -> dict:
    """Returns what pip would install for `requirement`, by the entries of pip's installation report.

    Raises:
        UpstreamError: pip finds nothing.
    """
    done = _pip("-q", "install", "--dry-run", "--ignore-installed", "--report", "-", requirement)
    if done.returncode:
        cause = _cause(done.stdout + done.stderr)
        raise UpstreamError(f"can't find {requirement}: pip says {cause!r}; check the network and pip's index")
    return json.loads(done.stdout)["install"][0]


def _pip(verbosity: str, command: str, *options: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", verbosity, command, "--no-deps"]
    line += ["--only-binary=:all:", "--ignore-requires-python", *options]
    # A pip that builds this project tells the pips that it starts about its own build; this one is none of them.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_BUILD_TRACKER"}
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def _cause(said: str) -> str:
    # That a host was not reached tells more than pip's last line, that there is no matching distribution.
    causes = re.findall(r"Could not fetch URL (.*?)(?: - skipping)?$", said, re.MULTILINE)
    causes += re.findall(r"^\s*ERROR: (.*)", said, re.MULTILINE)[-1:] or said.splitlines()[-1:] or ["nothing"]
    return causes[0].strip()
