# SPDX-License-Identifier: Apache-2.0
"""Install the kit beside the host's torch, without network: `python3 install.py ENVIRONMENT`. `run.sh` calls it.

This file is part of the kit and needs only Python's standard library. It runs in the Python that has torch, and
doesn't change that Python: the environment is a separate folder, in which the kit's packages come before the host's.
"""

import hashlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path


STAMP = "kit.json"  # written last: an environment without it is incomplete
PAYLOAD = "payload"


class KitError(Exception):
    """The kit can't be installed, for the reason in the message."""


def main() -> None:
    """Install the kit, or print in one line why not."""
    try:
        install(Path(__file__).resolve().parent, Path(sys.argv[1]).absolute())
    except (KitError, OSError) as error:
        sys.exit(f"error: {error}")


def install(kit: Path, environment: Path) -> None:
    """Make the environment, unless this kit is installed there already.

    Args:
        kit: the folder of the kit.
        environment: the folder of the environment; an older environment is replaced.

    Raises:
        KitError: the host doesn't fit, a part is missing or damaged, or the folder holds something else.
    """
    manifest = json.loads((kit / "manifest.json").read_text())
    check_host(manifest)
    wanted = {"host": sys.executable, "torch": torch_of_host()[0], "parts": manifest["parts"]}
    if (environment / STAMP).is_file() and json.loads((environment / STAMP).read_text()) == wanted:
        print(f"the kit is already installed in {environment}")
        return
    parts = check_parts(kit, manifest)
    clear(environment)
    environment.mkdir(parents=True, exist_ok=True)
    (environment / "pyvenv.cfg").touch()  # so that `clear` recognizes an interrupted installation
    unpack(parts, environment / PAYLOAD, manifest)
    make_environment(environment, wheels(environment / PAYLOAD, manifest))
    (environment / STAMP).write_text(json.dumps(wanted))
    print(f"installed in {environment}, beside torch {wanted['torch']} of {sys.executable}")


def check_host(manifest: dict) -> None:
    """Refuse a Python of another version or without torch."""
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    if found != manifest["python"]:
        raise KitError(
            f"{sys.executable} is Python {found}, and the kit needs Python {manifest['python']}: "
            f"set PYTHON to a Python {manifest['python']} that has torch"
        )
    if importlib.util.find_spec("torch") is None:
        raise KitError(f"{sys.executable} has no torch: set PYTHON to the Python that has this host's torch")


def torch_of_host() -> tuple:
    """Return the versions of torch and its CUDA, without the seconds that an import takes."""
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin, "`check_host` has found it"
    found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return str(found["__version__"]), found.get("cuda")


def check_parts(kit: Path, manifest: dict) -> list:
    """Return the paths of the parts, or raise an error that names missing or damaged ones."""
    paths = [kit / part["file"] for part in manifest["parts"]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise KitError(f"missing {', '.join(missing)} of {len(paths)} parts: copy the missing parts to {kit}")
    pairs = zip(paths, manifest["parts"])  # noqa: B905  an older Python must be able to run `check_host`
    damaged = [path.name for path, part in pairs if sha256(path) != part["sha256"]]
    if damaged:
        raise KitError(f"damaged {', '.join(damaged)}: copy the damaged parts to {kit} again")
    return paths


def sha256(path: Path) -> str:
    """Return the hash of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def clear(environment: Path) -> None:
    """Remove an older environment. Refuse any other folder that is not empty."""
    if (environment / "pyvenv.cfg").is_file():
        shutil.rmtree(environment)
    elif environment.exists() and any(environment.iterdir()):
        raise KitError(f"{environment} is not empty and not an environment: set KIT_ENVIRONMENT to another folder")


def unpack(parts: list, folder: Path, manifest: dict) -> None:
    """Join and unpack the parts, and check each file."""
    # Of a stream, tarfile calls `read` and nothing else.
    with Joined(parts) as joined, tarfile.open(fileobj=joined, mode="r|") as archive:  # type: ignore[call-overload]
        archive.extractall(folder, filter="data")
    damaged = [entry["file"] for entry in manifest["files"] if sha256(folder / entry["file"]) != entry["sha256"]]
    if damaged:
        raise KitError(f"{damaged[0]} differs from the manifest: make the kit again")


class Joined:
    """Several files that are read as one."""

    def __init__(self, paths: list) -> None:
        self.paths = list(paths)
        self.file: io.BufferedReader | None = None

    def __enter__(self) -> "Joined":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end of the last file."""
        found = b""
        while len(found) < size and (self.file or self.paths):
            file = self.file = self.file or self.paths.pop(0).open("rb")
            block = file.read(size - len(found))
            if not block:
                file.close()
                self.file = None
            found += block
        return found


def wheels(payload: Path, manifest: dict) -> list:
    """Return the wheels to install. Transformer Engine is only installed beside the torch that it was compiled for."""
    compiled = manifest["transformer_engine"]
    if not compiled:
        return sorted((payload / "wheels").glob("*.whl"))
    version, cuda = torch_of_host()
    why_not = None
    if importlib.util.find_spec("transformer_engine"):
        why_not = "the host has its own"
    elif (version.split("+")[0], str(cuda).split(".")[0]) != (compiled["torch"], compiled["cuda"]):
        why_not = f"it is for torch {compiled['torch']} and CUDA {compiled['cuda']}, found {version} and {cuda}"
    if why_not:
        print(f"the kit's Transformer Engine is not installed: {why_not}")
    found = sorted((payload / "wheels").glob("*.whl"))
    return [path for path in found if not (why_not and path.name.startswith("transformer_engine"))]


def make_environment(environment: Path, found: list) -> None:
    """Make a virtual environment with these wheels, in which the host's packages come after its own.

    `--system-site-packages` would miss the packages of a host's Python that is itself in a virtual environment, as in
    many images.
    """
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python, pip = environment / "bin" / "python", next(path for path in found if path.name.startswith("pip-"))
    quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    run(str(python), f"{pip}/pip", "install", *quiet, *map(str, found))
    folders = host_folders()
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "host.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
    # Transformer Engine looks for cuDNN and cuBLAS only in the folder that it is installed in
    # (`_load_cuda_library_from_python`, `transformer_engine/common/__init__.py`, 2.20.2).
    libraries = next((Path(folder, "nvidia") for folder in folders if Path(folder, "nvidia").is_dir()), None)
    if libraries and not (site / "nvidia").exists():
        (site / "nvidia").symlink_to(libraries)


def host_folders() -> list:
    """Return the folders in which the host's Python finds packages, including those of PYTHONPATH and the user."""
    own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    kept = [os.path.abspath(path) for path in sys.path[1:] if os.path.isdir(path)]
    return [path for path in kept if path not in own and os.path.basename(path) != "lib-dynload"]


def run(*command: str) -> None:
    """Run a command of the installation without the variables that lead to the host's packages."""
    forgotten = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")
    variables = {name: value for name, value in os.environ.items() if name not in forgotten}
    variables.update(PYTHONNOUSERSITE="1", PIP_CONFIG_FILE=os.devnull)
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        raise KitError(f"{' '.join(command[:4])} … failed: {last}")


if __name__ == "__main__":
    main()
