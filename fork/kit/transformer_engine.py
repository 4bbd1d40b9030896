# SPDX-License-Identifier: Apache-2.0
"""Compile the PyTorch part of Transformer Engine for CUDA, once, without a GPU.

PyPI has the library as a wheel, but the PyTorch part only as sources, because it must match one version of torch.
NVIDIA's wheels have the headers that it needs: the dependency group `transformer-engine-build`.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import platformdirs

from fork.errors import ForkError
from fork.upstream import CACHE


VERSION = "2.20.2"
COMPILED_FOR = {"version": VERSION, "torch": "2.11.0", "cuda": "13"}
IMPORTED = ["onnxscript"]
"""What it imports besides the kit's packages. Its other requirements are imported only when they are used."""
REQUIREMENTS = [f"transformer-engine=={VERSION}", f"transformer-engine-cu13=={VERSION}"]


def compiled() -> Path:
    """Returns the wheel of the PyTorch part from the user's cache folder. The first call compiles it (16 CPU minutes).

    MAX_JOBS limits the number of compilers that run at a time.

    Raises:
        ForkError: another version of torch is installed, or the compilation fails.
    """
    if metadata.version("torch").partition("+")[0] != COMPILED_FOR["torch"]:
        raise ForkError(f"found torch {metadata.version('torch')}, expected {COMPILED_FOR['torch']}; use nox -s kit")
    kept = platformdirs.user_cache_path(CACHE) / "transformer-engine" / "-".join(COMPILED_FOR.values())
    if not (found := list(kept.glob("*.whl"))):
        kept.mkdir(parents=True, exist_ok=True)
        found = [_compile(kept)]
    return found[0]


def _compile(kept: Path) -> Path:
    """Compiles into `kept`, where the compiler's output stays in case of a failure."""
    log = kept / "log.txt"
    print(f"compiling transformer-engine-torch {VERSION}; log: {log}", file=sys.stderr)
    pip = ["-m", "pip", "-v", "wheel", "--no-deps", "--no-build-isolation", "--no-binary", "transformer-engine-torch"]
    with tempfile.TemporaryDirectory(dir=kept) as scratch, log.open("wb") as output:
        command = [sys.executable, *pip, "--wheel-dir", scratch, f"transformer-engine-torch=={VERSION}"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        if done.returncode:
            raise ForkError(f"the compilation of Transformer Engine failed; see {log}")
        wheel = next(Path(scratch).glob("*.whl"))
        return wheel.rename(kept / wheel.name)


def _environment() -> dict[str, str]:
    """Returns environment variables with which the compiler finds the headers of NVIDIA's wheels."""
    site = Path(sysconfig.get_path("purelib"))
    headers = [site / "nvidia" / "cudnn" / "include", site / "nvidia" / "nccl" / "include", site / "include"]
    return {
        **os.environ,
        "CUDA_HOME": str(site / "nvidia" / "cu13"),
        "CPLUS_INCLUDE_PATH": os.pathsep.join(map(str, headers)),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
