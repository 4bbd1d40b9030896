# SPDX-License-Identifier: Apache-2.0
"""Find the packages of the kit among the installed ones, by their requirements and by imports."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fork.errors import ForkError
from fork.stack import REPOSITORY


BRIDGE = "megatron-bridge"
FOUND = (
    "absl-py",
    "antlr4-python3-runtime",
    "attrs",
    "braceexpand",
    "bracex",
    "cffi",
    "charset-normalizer",
    "datasets",
    "deprecation",
    "dill",
    "einops",
    "filetype",
    "jsonschema",
    "jsonschema-specifications",
    "lark",
    "megatron-energon",
    "multi-storage-client",
    "multiprocess",
    "nvidia-ml-py",
    "nvidia-modelopt",
    "omegaconf",
    "opentelemetry-api",
    "pandas",
    "pillow",
    "protobuf",
    "psutil",
    "pulp",
    "pyarrow",
    "python-dateutil",
    "rapidyaml",
    "referencing",
    "requests",
    "rpds-py",
    "scipy",
    "six",
    "tensorboard",
    "urllib3",
    "wcmatch",
    "webdataset",
    "xattr",
    "xxhash",
)
"""What `needed` has found so far. It would find a package that is missing here, with one more trial import."""
LEFT_OUT = ("torch", "hf-xet")
"""The host has torch and its requirements. hf-xet, 4 MB of huggingface-hub's requirements, is for downloads only."""
TESTS = REPOSITORY / "tests" / "functional"

# Many modules are imported only when they are used, so the trial converts a model too.
TRIAL = """
import importlib, sys, tempfile
from pathlib import Path
if __name__ == "__main__":
    sys.path[:0] = {paths}
    import models
    from megatron.bridge import AutoBridge
    with tempfile.TemporaryDirectory() as folder:
        source = models.make_model(Path(folder, "hf"))
        AutoBridge.import_ckpt(source, Path(folder, "megatron"))
        bridge = AutoBridge.from_hf_pretrained(source)
        bridge.export_ckpt(Path(folder, "megatron"), Path(folder, "exported"), show_progress=False)
    import cuda_emulation
    cuda_emulation.install()
    for name in {modules}:
        importlib.import_module(name)
"""


def needed(tools: Sequence[str]) -> list[str]:
    """Returns the names of the packages that the functional tests need, besides torch and the fork build.

    The fork build requires packages for every kind of training and data. The kit takes only those without which its
    modules, Megatron-LM's loop, or the tests can't be imported. It takes all requirements of Megatron Core,
    transformers, and the tools.

    Args:
        tools: the requirements of the tests' tools, and of other imports.

    Raises:
        ForkError: a module can't be imported here, and no installed package has it.
    """
    names = closure(["pip", "megatron-core", "transformers", *(Requirement(each).name for each in tools)])
    here = {canonicalize_name(each.name) for each in metadata.distributions()}
    names += [name for name in FOUND if name in here and name not in names]
    with tempfile.TemporaryDirectory() as folder:
        link([*closure(["torch"], through=()), BRIDGE, *names], Path(folder))
        while module := _missing(Path(folder)):
            found = _owner(module)
            if found in names:
                raise ForkError(f"the tests can't import {module!r}, although {found} is installed")
            print(f"needed for the module {module}: {found}", file=sys.stderr)
            link([found], Path(folder))
            names.append(found)
    return sorted(names)


def closure(names: Iterable[str], through: Sequence[str] = LEFT_OUT) -> list[str]:
    """Returns the packages and all their requirements without extras, except for `through` and their requirements."""
    found: list[str] = []
    waiting: list[str] = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in (*found, *through):
            found.append(name)
            asked = [Requirement(each) for each in _distribution(name).requires or []]
            # An empty `extra` leaves out the requirements of extras.
            chosen = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
            # A requested extra, such as cuda-toolkit's in torch, is in the same metadata.
            for each in chosen:
                waiting += [canonicalize_name(each.name), *_of_extras(each)]
    return found


def _of_extras(requirement: Requirement) -> Iterator[str]:
    for extra in requirement.extras:
        for each in map(Requirement, _distribution(requirement.name).requires or []):
            if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate({"extra": ""}):
                yield canonicalize_name(each.name)


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ForkError(f"{name} is not installed; make the kit with nox -s kit, which installs it") from None


def _missing(folder: Path) -> str | None:
    """Imports and converts with only the packages in `folder`; returns the missing module, or None."""
    # On GPUs, only the rows of the matrix run.
    files = [path for path in TESTS.glob("*.py") if not path.stem.startswith("test_") or path.stem == "test_matrix"]
    modules = sorted(path.stem for path in files)
    script = TRIAL.format(paths=[str(folder), str(TESTS)], modules=modules)
    # -S hides this environment's packages, -I hides the user's.
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, env=quiet)
    if done.returncode == 0:
        return None
    # Take the last one: caught errors may be printed too, and modelopt raises another error.
    named = re.findall(r"No module named '([\w.]+)'", done.stderr)
    if not named:
        last = done.stderr.strip().splitlines()[-1]
        raise ForkError(f"the kit lacks a package: {last}; add the package to FOUND in {__name__}")
    return named[-1]


def _owner(module: str) -> str:
    """Returns the package that has a module. Several packages may share its first name."""
    path = module.replace(".", "/")
    for name in metadata.packages_distributions().get(module.partition(".")[0], []):
        files = metadata.distribution(name).files or []
        if any(str(file).startswith((f"{path}/", f"{path}.")) for file in files):
            return canonicalize_name(name)
    raise ForkError(f"no installed package has the module {module!r}; add its package to pyproject.toml")


def link(names: Iterable[str], folder: Path) -> None:
    """Links the files of installed packages into `folder`, so that it has these packages only.

    A folder of one package is linked as a whole. In a folder that several packages share, each file is linked.
    """
    shared = {top for top, owners in metadata.packages_distributions().items() if len(set(owners)) > 1}
    for name in names:
        for file in metadata.distribution(name).files or []:
            top = file.parts[0]
            if top == "..":
                continue
            path = Path(file) if top in shared else Path(top)
            if not (folder / path).is_symlink():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).symlink_to(str(metadata.distribution(name).locate_file(path)))
