# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.2.9", "packaging", "platformdirs"]
# ///
"""Every command that a person or CI runs. What follows `--` goes to the tool that the session runs.

`--upstream-wheel PATH` there gives megatron-bridge's wheel on a host without network, in every session that builds.
`--upstream VERSION` builds on another of the upstream versions in fork/upstream.py.
`--wheel PATH` tests that wheel in place of the one that is built.
`--megatron-lm DIR` trains with `pretrain_gpt.py` of that checkout of Megatron-LM in the functional sessions, and lets
megatron_versions read with that checkout as well.
`--primus DIR` runs the row there that needs a checkout of AMD-AGI/Primus.
"""

import argparse
import hashlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nox


sys.path.insert(0, str(Path(__file__).parent))
import fork.upstream
from fork.upstream import LATEST, RELEASES


nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = [
    "lint",
    "stack",
    "unit",
    "functional",
    "megatron_versions(0.15.3)",
    "megatron_versions(0.18.2)",
]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHON = PYPROJECT["project"]["requires-python"].removeprefix(">=").partition(",")[0]


def _host_for_gpus() -> str | None:
    """The version of the python3 on the PATH if this is a GPU host whose packages have what training needs.

    A workstation may have a GPU's driver and nothing else; its functional sessions run on the CPU.
    """
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return None
    look = (
        "import importlib.util as u, platform; all(map(u.find_spec, ('torch', 'megatron')))"
        " and print('.'.join(platform.python_version_tuple()[:2]))"
    )
    found = subprocess.run([shutil.which("python3"), "-c", look], capture_output=True, text=True)
    return found.stdout.strip() or None


# There the functional sessions take torch, Transformer Engine and Megatron Core as they are: docs/gpu-runners.md
GPU = _host_for_gpus()

CORES = list(nox.project.load_toml("tests/compatibility/cores.toml"))

built: list[Path] = []
# Of the environment of megatron_versions_release: one for all Megatron Cores.
shared_bin: list[Path] = []
# The Python of the session `transformers_4`, for the functional tests.
transformers_4_python: list[str] = []


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting, and the workflows, without network."""
    session.install(*_group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    workflows = [str(path) for path in sorted(Path(".github", "workflows").glob("*.yml"))]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", *workflows)


@nox.session(python=PYTHON)
def stack(session: nox.Session) -> None:
    """Print the changes of the stack with their sizes; fail above a change's limit."""
    session.install(*_group("fork"))
    session.run("python", "-m", "fork", "stack", *_release(session))


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Build the patched wheel into dist/."""
    session.install(*_group("fork"))
    # Part of the installation, for the sessions that install what this prints.
    printed = session.run_install("python", "-m", "fork", "build", *_release(session), silent=True, stderr=None)
    if printed:
        built[:] = [Path(printed.strip())]
        session.log(f"wrote {built[0]}")


@nox.session(python=PYTHON)
def diff(session: nox.Session) -> None:
    """Print what the stack changes in an upstream version, in colour on a terminal, and write it into dist/."""
    session.install(*_group("fork"))
    session.run("python", "-m", "fork", "diff", *_release(session), *_arguments(session)[1])


@nox.session(python=PYTHON)
def release(session: nox.Session) -> None:
    """Build the wheels over every upstream version into dist/release/, with checksums and notes."""
    session.install(*_group("fork"))
    session.run("python", "-m", "fork", "release", *session.posargs)


@nox.session(python=PYTHON)
def upstream_pr(session: nox.Session) -> None:
    """Commit the stack on a new branch of a checkout of Megatron-Bridge: `-- PATH_TO_CHECKOUT [--change NAME …]`.

    `--check` runs upstream's unit tests of what is touched, before the first commit and after each.
    """
    checkout = next((Path(each) for each in session.posargs if Path(each).is_dir()), None)
    if checkout is None:
        session.error("expected the path of a Megatron-Bridge checkout: nox -s upstream_pr -- PATH_TO_CHECKOUT")
    options = list(session.posargs)
    if "--check" in options:
        _install_release(session, LATEST.version, Path("dist", "upstream-pr"))
        session.install(*_group("unit"))
        options.insert(options.index("--check") + 1, str(Path(session.bin, "python")))
    hooks = checkout / ".pre-commit-config.yaml"
    pinned = re.search(r"ruff-pre-commit\s+rev: \W?v([\d.]+)", hooks.read_text("utf-8") if hooks.is_file() else "")
    session.install(*_group("fork"))
    if pinned:
        session.install(f"ruff=={pinned[1]}")
    session.run("python", "-m", "fork", "pull-request", *options)


@nox.session(python=PYTHON, requires=["build"])
def unit(session: nox.Session) -> None:
    """Test the edits, the build and the new modules."""
    _install_patched(session)
    _install_transformer_engine(session)
    _pytest(session, ["tests/reliability", "tests/unit"], "-m", "not two_processes")


@nox.session(python=PYTHON, requires=["build"])
def two_processes(session: nox.Session) -> None:
    """Convert in two processes: each fault, each option that changes what is written, and uploads."""
    _install_patched(session)
    _pytest(session, ["tests/reliability"], "-m", "two_processes")


@nox.session(python=PYTHON, requires=["build"])
def races(session: nox.Session) -> None:
    """Race exports with exports, and imports with trainings that save: `-- --rounds 100`; then kill exports."""
    _install_patched(session)
    session.run("python", "tests/reliability/races.py", *_arguments(session)[1])
    session.run("python", "tests/reliability/kills.py", "--export")


@nox.session(python=PYTHON, requires=["build"])
def types(session: nox.Session) -> None:
    """Check the types of src/, fork/ and changes/ against the wheel and what it stands on."""
    _install_patched(session)
    session.install(*_group("types"))
    session.run("mypy", *_arguments(session)[1])


@nox.session(python=PYTHON)
def transformers_4(session: nox.Session) -> None:
    """Install the transformers of Bridge 0.3, with which the functional tests read what is exported."""
    session.install(f"transformers=={RELEASES['0.3.1'].transformers}", *_torch())
    transformers_4_python[:] = [str(Path(session.bin, "python"))]


@nox.session(
    python=PYTHON,
    requires=["build", *([] if GPU else ["transformers_4"])],
    venv_params=["--system-site-packages"] if GPU else [],
)
def functional(session: nox.Session, *options: str) -> None:
    """Convert, train with Megatron-LM, resume and export, on what the machine has."""
    if GPU:
        _install_beside_host(session)
    else:
        _install_patched(session)
    given = _arguments(session)[0]
    checkouts = {"--megatron-lm": given.megatron_lm, "--primus": given.primus}
    taken = [f"{option}={checkout}" for option, checkout in checkouts.items() if checkout]
    session.env["TRANSFORMERS_4_PYTHON"] = next(iter(transformers_4_python), None)
    _pytest(session, ["tests/functional"], *options, *taken)


@nox.session(python=PYTHON, requires=["build"])
def variants(session: nox.Session) -> None:
    """Import every variant of a config, compare Megatron-LM's logits with transformers', and verify: `-- -k yarn`."""
    _install_patched(session)
    tests = ["tests/functional/test_variants.py", "tests/functional/test_verify.py"]
    _pytest(session, tests, "--platform=cpu", "--variants")


@nox.session(python=PYTHON, requires=["build"])
def exports(session: nox.Session) -> None:
    """Let Megatron-LM save models in each format and layout, and export them: `-- -k torch_dist`."""
    _install_patched(session)
    _pytest(session, ["tests/exports"])


def _functional_on(platform: str) -> None:
    @nox.session(
        python=PYTHON, requires=functional.requires, name=f"functional({platform})", venv_params=functional.venv_params
    )
    def forced(session: nox.Session) -> None:
        """The same, on this platform or not at all."""
        functional(session, f"--platform={platform}")


for platform in ("cpu", "cuda", "rocm"):
    _functional_on(platform)


@nox.session(python=PYTHON, requires=["build"], venv_params=functional.venv_params)
def visit(session: nox.Session) -> None:
    """Run rows in the order of their worth, on a machine that is at hand for minutes: `-- --minutes 10`."""
    if GPU:
        _install_beside_host(session)
        session.install("psutil")
    else:
        _install_patched(session)
    session.run("python", "tests/functional/visit.py", *_arguments(session)[1])


# The wheel of megatron-core 0.16 has no `megatron.training`.
@nox.session(python=PYTHON)
@nox.parametrize(
    "version", [nox.param(v, id=each.megatron_core) for v, each in RELEASES.items() if each.megatron_core >= "0.17"]
)
def functional_versions(session: nox.Session, version: str) -> None:
    """Run rows of the matrix with this Megatron Core and the version of Bridge that goes with it."""
    _install_release(session, version, Path("dist", "compatibility"))
    session.install(*_group("tools"))
    _pytest(session, ["tests/functional"], "--platform=cpu", "--row=llama-3-1-rank", "--row=llama-3-tp2")


@nox.session(python=PYTHON, requires=["build"], default=False)
def megatron_versions_release(session: nox.Session) -> None:
    """Make the release checkpoint that megatron_versions reads, and the environment that it shares."""
    _install_patched(session)
    shared_bin[:] = [Path(session.bin).absolute()]
    _versions(session, "make")


@nox.session(venv_backend="none", requires=["megatron_versions_release"])
@nox.parametrize("reader", [nox.param(each, id=each) for each in [*CORES, "checkout"]])
def megatron_versions(session: nox.Session, reader: str) -> None:
    """Load one release checkpoint with this Megatron Core, and train if it has a loop; writes docs/compatibility.md.

    `checkout` is the checkout of Megatron-LM that `--megatron-lm DIR` names.
    """
    checkout = _arguments(session)[0].megatron_lm
    if reader == "checkout" and checkout is None:
        session.skip("there is no --megatron-lm")
    _versions(session, "read", str(checkout) if reader == "checkout" else reader)


def _versions(session: nox.Session, command: str, *arguments: str) -> None:
    folder = Path("dist", "megatron-versions", _arguments(session)[0].upstream)
    session.env["PYTHONDONTWRITEBYTECODE"] = None  # as in `_pytest`
    python = str(shared_bin[0] / "python")
    session.run(python, "tests/compatibility/versions.py", command, str(folder), *arguments, external=True)


@nox.session(python=PYTHON, requires=["build"])
def families(session: nox.Session) -> None:
    """Take a tiny model of each family out and back: `-- ARCHITECTURE …`; writes docs/compatibility.md.

    A run that was stopped goes on, if the build is the same. Without arguments, it then loads releases of what
    converts with Megatron Core's own layers into Transformer Engine's modules.
    """
    _install_patched(session)
    _install_transformer_engine(session)
    _keep_bytecode(session)
    page, given = "--page=docs/compatibility.md", _arguments(session)[1]
    session.run("python", "tests/families/check.py", page, *given)
    if not given:
        session.run("python", "tests/with_transformer_engine/load_families.py", page)


@nox.session(python=PYTHON, requires=["build"])
def quickstart(session: nox.Session) -> None:
    """Show the whole way from a Hugging Face checkpoint to Megatron-LM and back."""
    _install_patched(session)
    session.run("python", "tests/functional/quickstart.py", *_arguments(session)[1])


@nox.session(python=PYTHON, requires=["build"])
def kit(session: nox.Session) -> None:
    """Write dist/kit/, with which a GPU host without network runs the functional tests: docs/gpu-runners.md.

    `-- --part-size 60M` cuts it into parts, `--transformer-engine` adds that for CUDA 13, compiled the first time.
    `--prove` runs it on a bare host that it makes here, without a GPU and without network.
    """
    _install_patched(session)
    given, rest = _arguments(session)
    if "--transformer-engine" in rest:
        session.install(*_group("transformer-engine-build"))
    wheel = given.wheel or next(iter(built), None)
    options = [f"--wheel={wheel}"] if wheel else []
    options += [f"--tool={each}" for each in _group("tools")]
    session.run("python", "-m", "fork", "kit", *options, *(each for each in rest if each != "--prove"))
    if "--prove" in rest:
        session.run("pytest", "tests/functional/test_kit.py", "--kit=dist/kit")


@nox.session(python=PYTHON, requires=["build"])
def benchmark(session: nox.Session) -> None:
    """Compare the streaming import and export with `cp -r` and with upstream's: `-- --sizes 8b-2,8b-6 --rounds 1`."""
    _install_patched(session)
    session.run("python", "-m", "benchmarks", *_arguments(session)[1])


@nox.session(python=PYTHON, requires=["build"])
def scale(session: nox.Session) -> None:
    """Import and export checkpoints of 405B and 671B whose values are holes: `-- --models DeepSeek-V3`."""
    _install_patched(session)
    session.run("python", "-m", "benchmarks.scale", *_arguments(session)[1])


@nox.session(python=PYTHON)
@nox.parametrize("version", [nox.param(version, id=version) for version in RELEASES])
def compatibility(session: nox.Session, version: str) -> None:
    """Build on each upstream version, and convert, train, and export with its packages; writes docs/compatibility.md.

    `--megatron-lm DIR` is a checkout of Megatron-LM for megatron-core 0.16, whose wheel has no training loop.
    """
    _try_release(session, version)


def _try_release(session: nox.Session, version: str) -> None:
    rows = Path("dist", "compatibility")
    _install_release(session, version, rows)
    try:
        checkout = _arguments(session)[0].megatron_lm
        option = [f"--megatron-lm={checkout}"] if checkout else []
        session.run("python", "tests/compatibility/check.py", *option, str(rows / f"{version}.json"))
    finally:
        session.run("python", "tests/compatibility/table.py", str(rows), "docs/compatibility.md")


@nox.session(python=PYTHON)
def adopt(session: nox.Session) -> None:
    """See whether the stack fits a new upstream version, then build and try it: `-- VERSION`."""
    version = next((each for each in session.posargs if each[:1].isdigit()), None)
    if version is None:
        session.error("expected an upstream version: nox -s adopt -- VERSION")
    session.install(*_group("fork"))
    given, rest = _arguments(session)
    wheel = [f"--upstream-wheel={given.upstream_wheel}"] if given.upstream_wheel else []
    session.run("python", "-m", "fork", "adopt", *rest, *wheel)
    # The line that this added to the table.
    RELEASES.update(importlib.reload(fork.upstream).RELEASES)
    _try_release(session, version)


def _install_release(session: nox.Session, version: str, folder: Path) -> None:
    """Builds on this upstream version, and installs the wheel with what goes with it."""
    pins = _goes_with(version)
    session.install(*_group("fork"))
    build = ["python", "-m", "fork", "build", f"--out={folder}", f"--upstream={version}"]
    wheel = session.run_install(*build, silent=True, stderr=None)
    if wheel:
        session.install(wheel.strip(), *pins, *_torch())
        session.install("--force-reinstall", "--no-deps", wheel.strip())


def _goes_with(version: str) -> list[str]:
    """The packages that go with an upstream version."""
    release = RELEASES[version]
    return [f"megatron-core=={release.megatron_core}", f"transformers=={release.transformers}"]


def _torch() -> list[str]:
    return [each for each in _group("functional") if each.startswith("torch==")]


def _release(session: nox.Session) -> list[str]:
    """The options that say which upstream version it is, for the commands of fork/."""
    given, _ = _arguments(session)
    wheel = [f"--upstream-wheel={given.upstream_wheel}"] if given.upstream_wheel else []
    return [f"--upstream={given.upstream}", *wheel]


def _group(name: str) -> list[str]:
    return nox.project.dependency_groups(PYPROJECT, name)


def _arguments(session: nox.Session) -> tuple[argparse.Namespace, list[str]]:
    """The options that are the sessions' own, and the arguments that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--upstream-wheel")
    parser.add_argument("--megatron-lm", type=Path)
    parser.add_argument("--primus", type=Path)
    parser.add_argument("--upstream", choices=list(RELEASES), default=LATEST.version)
    parser.add_argument("--wheel", type=Path)
    return parser.parse_known_args(session.posargs)


def _pytest(session: nox.Session, folders: Sequence[str], *options: str) -> None:
    """Runs the tests of `folders`, or those at the paths that the user names."""
    given, rest = _arguments(session)
    if given.upstream_wheel:
        session.env["MEGATRON_BRIDGE_UPSTREAM_WHEEL"] = given.upstream_wheel
    _keep_bytecode(session)
    named = any(argument.partition("::")[0].startswith("tests") for argument in rest)
    # A wheel that is not of this commit may lack what a module of tests imports; the other modules run all the same.
    any_wheel = ["--continue-on-collection-errors"] if given.wheel else []
    own = [option for option in session.posargs if option not in rest]
    session.env["FUNCTIONAL_COMMAND"] = shlex.join(["python3", "-m", "nox", "-s", session.name, "--", *own])
    if wheel := given.wheel or next(iter(built), None):
        session.env["MEGATRON_BRIDGE_WHEEL"] = str(wheel.absolute())
    # A file's tests share what they made, and so do the rows of a model (tests/conftest.py). Arguments are for looking
    # closer, and GPUs for one row at a time. The order stays, because the groups with the fewest tests are those that
    # take longest.
    two = ["--numprocesses=2", "--dist=loadgroup", "--no-loadscope-reorder"]
    parallel = [] if rest or GPU else two
    session.run("pytest", *([] if named else folders), *any_wheel, *parallel, *options, *rest)


def _keep_bytecode(session: nox.Session) -> None:
    """Images like to turn it off, and then every process compiles torch and Megatron Core anew."""
    session.env["PYTHONDONTWRITEBYTECODE"] = None


def _install_patched(session: nox.Session) -> None:
    """Installs the wheel and what the tests need, unless the environment has just these or `nox -R` says not to."""
    given, _ = _arguments(session)
    wheel = given.wheel or next(iter(built), None)
    if wheel is None:
        return
    wanted = [*_group("unit"), *_group("functional"), *_goes_with(given.upstream)]
    stamp = Path(session.virtualenv.location, "installed.txt")
    state = "\n".join([hashlib.sha256(wheel.read_bytes()).hexdigest(), *wanted])
    if not stamp.exists() or stamp.read_text() != state:
        session.install(str(wheel), *wanted)
        # The version stays the same from build to build, so an installer takes an older build for this one.
        session.install("--force-reinstall", "--no-deps", str(wheel))
        stamp.write_text(state)


def _install_transformer_engine(session: nox.Session) -> None:
    """Installs Transformer Engine's Python code into a folder that the tests put on the path of one process.

    In the environment itself it would be found by each that imports Megatron Core.
    """
    folder, wanted = Path(session.virtualenv.location, "transformer-engine"), _group("transformer-engine")
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        session.install("--no-deps", f"--target={folder}", *wanted)
    if folder.is_dir():  # not with `nox -R`, which installs nothing
        stamp.write_text("\n".join(wanted))
        session.env["TRANSFORMER_ENGINE"] = str(folder)


def _install_beside_host(session: nox.Session) -> None:
    """Installs the wheel and the tests' tools, and lets the environment see the packages of the python3 on the PATH.

    `--system-site-packages` alone passes by a python3 that is itself in a virtual environment, as in NVIDIA's image.
    """
    if GPU != PYTHON:
        session.error(f"python3 on the PATH is Python {GPU}, the wheel needs {PYTHON}: take a container that has it")
    folders = "import site; print('\\n'.join(site.getsitepackages()))"
    host = subprocess.check_output([shutil.which("python3"), "-c", folders], text=True)
    own = session.run_install("python", "-c", folders, silent=True)
    wheel = _arguments(session)[0].wheel or next(iter(built), None)
    if own and wheel:
        # `site` reads .pth files, which editable installations are, in folders that are added so, and in no others.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in host.splitlines()]
        Path(own.split()[0], "host.pth").write_text("".join(lines))
        session.install("--no-deps", "--force-reinstall", str(wheel))
        session.install(*_group("tools"))


if __name__ == "__main__":
    nox.main()
