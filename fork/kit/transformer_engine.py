# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine for CUDA, whose PyTorch part is compiled here, once, without a GPU.

PyPI has the library as a wheel and the PyTorch part as sources, because that must be compiled for one torch. NVIDIA's
wheels have the headers that it asks for: the dependency group `transformer-engine-build`.
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
"""What it imports beside the kit's packages; the rest of its requirements it does without until they are used."""
REQUIREMENTS = [f"transformer-engine=={VERSION}", f"transformer-engine-cu13=={VERSION}"]


def compiled() -> Path:
    """Returns the wheel of the PyTorch part, from the user's cache folder, or compiles it, which takes 16 CPU minutes.

    MAX_JOBS says how many compilers run at a time.

    Raises:
        ForkError: torch here is another one, or the compilation fails.
    """
    if metadata.version("torch").partition("+")[0] != COMPILED_FOR["torch"]:
        raise ForkError(f"found torch {metadata.version('torch')}, expected {COMPILED_FOR['torch']}; use nox -s kit")
    kept = platformdirs.user_cache_path(CACHE) / "transformer-engine" / "-".join(COMPILED_FOR.values())
    if not (found := list(kept.glob("*.whl"))):
        kept.mkdir(parents=True, exist_ok=True)
        found = [_compile(kept)]
    return found[0]


def _compile(kept: Path) -> Path:
    """Compiles into `kept`; the compiler's output stays there, for a failure."""
    log = kept / "log.txt"
    print(f"compiling transformer-engine-torch {VERSION}; log: {log}", file=sys.stderr)
    pip = ["-m", "pip", "-v", "wheel", "--no-deps", "--no-build-isolation", "--no-binary", "transformer-engine-torch"]
    with tempfile.TemporaryDirectory(dir=kept) as scratch, log.open("wb") as output:
        command = [sys.executable, *pip, "--wheel-dir", scratch, f"transformer-engine-torch=={VERSION}"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        if done.returncode:
            raise ForkError(f"Transformer Engine can't be compiled; see {log}")
        wheel = next(Path(scratch).glob("*.whl"))
        return wheel.rename(kept / wheel.name)


def _environment() -> dict[str, str]:
    """Returns the variables that lead the compiler to the headers of NVIDIA's wheels."""
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
