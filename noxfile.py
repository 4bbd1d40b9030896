# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.2.9"]
# ///
"""Every command that a person or CI runs. What follows `--` goes to the tool that the session runs.

`--upstream-wheel PATH` there gives megatron-bridge's wheel on a host without network, in every session that builds.
"""

import argparse
import hashlib
from pathlib import Path

import nox


nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "unit", "functional"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHON = PYPROJECT["project"]["requires-python"].removeprefix(">=").partition(",")[0]

built: list[Path] = []


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*_group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=PYTHON)
def build(session: nox.Session) -> None:
    """Build the patched wheel into dist/."""
    session.install(*_group("fork"))
    given, _ = _arguments(session)
    option = [f"--upstream-wheel={given}"] if given else []
    # Part of the installation, for the sessions that install what this prints.
    printed = session.run_install("python", "-m", "fork", "build", *option, silent=True, stderr=None)
    if printed:
        built[:] = [Path(printed.strip())]
        session.log(f"wrote {built[0]}")


@nox.session(python=PYTHON, requires=["build"])
def unit(session: nox.Session) -> None:
    """Test the edits, the build and the new modules."""
    _install_patched(session)
    _pytest(session, "tests/unit")


@nox.session(python=PYTHON, requires=["build"])
def functional(session: nox.Session) -> None:
    """Convert, train with Megatron-LM, resume and export, on what the machine has."""
    _install_patched(session)
    _pytest(session, "tests/functional")


@nox.session(python=PYTHON, requires=["build"])
def quickstart(session: nox.Session) -> None:
    """Show the whole way from a Hugging Face checkpoint to Megatron-LM and back."""
    _install_patched(session)
    session.run("python", "tests/functional/quickstart.py", *_arguments(session)[1])


def _group(name: str) -> list[str]:
    return nox.project.dependency_groups(PYPROJECT, name)


def _arguments(session: nox.Session) -> tuple[str | None, list[str]]:
    """The path that `--upstream-wheel` gives, and the arguments that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--upstream-wheel")
    known, rest = parser.parse_known_args(session.posargs)
    return known.upstream_wheel, rest


def _pytest(session: nox.Session, folder: str) -> None:
    """Runs the tests of `folder`, or those at the paths that the user names."""
    given, rest = _arguments(session)
    if given:
        session.env["MEGATRON_BRIDGE_UPSTREAM_WHEEL"] = given
    named = any(Path(argument.partition("::")[0]).exists() for argument in rest)
    session.run("pytest", *([] if named else [folder]), *rest)


def _install_patched(session: nox.Session) -> None:
    """Installs the wheel and what the tests need, unless the environment has just these or `nox -R` says not to."""
    if not built:
        return
    wheel = str(built[0])
    wanted = [*_group("unit"), *_group("functional")]
    stamp = Path(session.virtualenv.location, "installed.txt")
    state = "\n".join([hashlib.sha256(built[0].read_bytes()).hexdigest(), *wanted])
    if not stamp.exists() or stamp.read_text() != state:
        session.install(wheel, *wanted)
        # The version stays the same from build to build, so an installer takes an older build for this one.
        session.install("--force-reinstall", "--no-deps", wheel)
        stamp.write_text(state)


if __name__ == "__main__":
    nox.main()
