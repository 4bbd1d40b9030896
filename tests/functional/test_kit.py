# SPDX-License-Identifier: Apache-2.0
"""The offline kit works on a bare host: torch, numpy, another transformers, no network, and nothing else.

The default command makes one in parts. `nox -s kit -- --prove` proves the one in dist/kit/.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fork import backend, kit
from fork.kit.packages import closure, link
from fork.stack import REPOSITORY
from fork.upstream import LATEST


# Loopback is what ranks meet on; a new network namespace has it, switched off.
LOOPBACK = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS
os.execvp(sys.argv[1], sys.argv[1:])
"""
NOWHERE = "http://127.0.0.1:9"  # the port `discard`, where nobody listens
OF_THE_HOST = "raise SystemError('this is the host\\'s, and not the kit\\'s')\n"


@pytest.fixture(scope="module")
def offline() -> tuple[list[str], dict[str, str]]:
    """Return what starts a command without network: a namespace of its own, or where that is refused, proxies."""
    apart = ["unshare", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK]
    if shutil.which("unshare") and not subprocess.run([*apart, "true"], capture_output=True).returncode:
        return apart, {}
    return [], dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"], NOWHERE)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a bare host's Python, as images have it in a virtual environment."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    link([*closure(["torch"], through=()), "numpy"], site)
    install_of_the_host(site, "transformers", "5.17.0")
    install_of_the_host(site, "pytest_of_the_host", "1.0", "[pytest11]\nof_the_host = pytest_of_the_host\n")
    return folder


def install_of_the_host(site: Path, name: str, version: str, entry_points: str = "") -> None:
    """Install a package that must not be imported where the kit is in front."""
    (site / f"{name}.py").write_text(OF_THE_HOST)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the kit that `--kit` names, or make one in parts."""
    if given := request.config.option.kit:
        return given.absolute()
    default = REPOSITORY / "dist" / f"{backend.stem(LATEST)}-py3-none-any.whl"
    wheel = Path(os.environ.get("MEGATRON_BRIDGE_WHEEL", default))
    folder = tmp_path_factory.mktemp("kit") / "kit"
    tools = ["pytest", "pytest-xdist", "hypothesis", "jinja2", "junitparser", "rich"]
    kit.make(folder, wheel, tools, part_size=20 << 20, families=["llama-3"])
    return folder


def run(made: Path, bare: Path, offline: tuple[list[str], dict[str, str]], folder: Path, *arguments: str) -> Path:
    """Run the kit on the bare host, and give the folder of the results."""
    prefix, variables = offline
    own = ("PYTHONPATH", "VIRTUAL_ENV", "FUNCTIONAL_PLATFORM", "CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {name: value for name, value in environment.items() if name not in own} | variables
    environment |= {
        "PYTHON": str(bare / "bin" / "python"),
        "KIT_ENVIRONMENT": str(folder / "environment"),
        "KIT_RESULTS": str(folder / "results"),
        "FUNCTIONAL_PLATFORM": "cpu",
    }
    done = subprocess.run(
        [*prefix, str(made / "run.sh"), *arguments], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return folder / "results"


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


QUICKSTART = """
python tests/functional/platforms.py > "$KIT_RESULTS/host.json"
python tests/functional/quickstart.py --out "$KIT_RESULTS/quickstart"
"""


def test_quickstart_on_a_bare_host(made, bare, offline, tmp_path: Path, record_property) -> None:
    before = contents(bare)
    results = run(made, bare, offline, tmp_path, "--", "bash", "-ec", QUICKSTART)
    record_property(f"count of kits run {'without a network' if offline[0] else 'with proxies that lead nowhere'}", 1)
    assert contents(bare) == before
    versions = json.loads((results / "host.json").read_text())["versions"]
    assert versions["transformers"] == metadata.version("transformers") != "5.17.0"
    assert versions["megatron-bridge"] == metadata.version("megatron-bridge")
    assert "20 iterations" in (results / "visit.log").read_text()
    assert (results / "quickstart" / "megatron" / "iter_0000020").is_dir()
    # Transformer Engine looks for the host's cuDNN there.
    assert next(tmp_path.glob("environment/lib/python*/site-packages/nvidia")).samefile(
        next(bare.glob("lib/python*/site-packages/nvidia"))
    )
    # Whoever comes back with it loses no time to what is installed.
    again = run(made, bare, offline, tmp_path, "--", "true")
    assert "the kit is already installed in" in (again / "install.log").read_text()


def test_visit(made, bare, offline, tmp_path: Path) -> None:
    rows = ["--row=llama-3-1-rank-local", "--row=llama-3-1-rank-packed", "--row=gate-llama-3"]
    results = run(made, bare, offline, tmp_path, "--platform=cpu", *rows)
    first, *lines = map(json.loads, (results / "results.jsonl").read_text().splitlines())
    assert first["visit"]["machine"]["platform"] == "cpu"
    outcomes = {line["result"]["name"]: line["result"]["outcome"] for line in lines}
    # The gate computes with Megatron Core's layers here, which is never a pass.
    assert outcomes == {
        "llama-3-1-rank-local": "passed",
        "llama-3-1-rank-packed": "passed",
        "gate-llama-3": "left out",
    }


def test_transformer_engine_can_be_imported(made, bare, offline, tmp_path: Path) -> None:
    if not json.loads((made / "manifest.json").read_text())["transformer_engine"]:
        pytest.skip("not in this kit: nox -s kit -- --transformer-engine --prove")
    # torch first, as Megatron Core does: it brings NCCL, which the library of Transformer Engine is linked to.
    script = "import torch; import transformer_engine.pytorch as te; print('imported', te.LayerNormLinear)"
    results = run(made, bare, offline, tmp_path, "--", "python", "-c", script)
    assert "imported <class 'transformer_engine." in (results / "visit.log").read_text()
