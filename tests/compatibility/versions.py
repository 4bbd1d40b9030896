# SPDX-License-Identifier: Apache-2.0
"""Let every Megatron Core read one release checkpoint: `nox -s megatron_versions`.

    python tests/compatibility/versions.py make dist/megatron-versions/0.6.2
    python tests/compatibility/versions.py read dist/megatron-versions/0.6.2 0.15.3
    python tests/compatibility/versions.py read dist/megatron-versions/0.6.2 ../Megatron-LM

All commands run in the environment of a fork build. The first makes a tiny Llama 3 and imports it. The others let a
Megatron Core from PyPI or from a checkout of Megatron-LM load the release checkpoint, in processes that find that
Megatron Core first. If it comes with `megatron.training`, it trains too. The result is written to
docs/compatibility.md. A wrong result makes the exit code 1.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import platformdirs


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[1:1] = [str(ROOT), str(HERE.parent / "functional")]

import grid  # noqa: E402
import page  # noqa: E402

from fork.upstream import CACHE  # noqa: E402


CORES = tomllib.loads((HERE / "cores.toml").read_text("utf-8"))
REFERENCE = list(CORES)[-1]
"""The Megatron Core with the reference losses."""
PINS = {
    "d3528a21301db2d12e92912b3ec025dc8a2ed4d6": "pin of AMD Primus",
    "1dcf0dafa884ad52ffb243625717a3471643e087": "pin of slime",
}
BLOCK = "megatron-versions"
PAGE = Path("docs", "compatibility.md")
ITERATIONS = 3
LOSS_TOLERANCE = 1e-4  # float32
EMULATED = {"FUNCTIONAL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}


class Failed(Exception):
    """A Megatron Core failed with the release checkpoint."""


def make(folder: Path) -> None:
    """Empty `folder`, and write a model, its release checkpoint, its weights, and conversations there."""
    import models
    import steps
    import torch
    from chat import write_conversations
    from weights import as_megatron

    from megatron.bridge import AutoBridge

    shutil.rmtree(folder, ignore_errors=True)
    AutoBridge.import_ckpt(models.make_model(folder / "hf"), folder / "megatron")
    (folder / "flags.json").write_text(json.dumps(steps.model_flags(folder / "megatron")), "utf-8")
    torch.save(as_megatron(folder / "hf"), folder / "weights.pt")
    write_conversations(folder / "train.jsonl", 64)
    write_conversations(folder / "valid.jsonl", 16, seed=2)


def unpacked(version: str) -> Path:
    """Return the folder of an unpacked megatron-core from PyPI. pip downloads it once and checks its hash."""
    folder = platformdirs.user_cache_path(CACHE) / "megatron-core" / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pinned, target = Path(scratch, "requirements.txt"), Path(scratch, "target")
        hashes = " ".join(f"--hash=sha256:{each}" for each in CORES[version]["sha256"])
        pinned.write_text(f"megatron-core=={version} {hashes}\n", "utf-8")
        # Unpack only a wheel. It may be for another Python, because nothing is installed.
        options = ["--only-binary=:all:", "--no-deps", f"--python-version={CORES[version]['python']}"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *options]
        if subprocess.run([*pip, f"--target={target}", f"--requirement={pinned}"]).returncode:
            sys.exit(f"can't get megatron-core {version}: see pip's error above; check the network and pip's index")
        target.rename(folder)
    return folder


def loads(folder: Path, core: Path, out: Path) -> None:
    """Let a Megatron Core load the release checkpoint, and compare every weight with the source.

    Raises:
        Failed: It doesn't load, a weight differs, or another Megatron Core was found.
    """
    # The import of core 0.15 compiles an extension for GPUs, which fails without a GPU. It skips that without ninja on
    # PATH.
    environment = os.environ | {"PATH": "", "PYTHONPATH": str(core)}
    given = [str(folder / "megatron" / "release"), str(folder / "weights.pt")]
    command = [sys.executable, str(HERE / "load_release.py"), *given]
    log = out / "load.txt"
    with log.open("w") as said:
        code = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        error = log.read_text("utf-8").strip().splitlines()[-1].removeprefix("[rank0]: ")
        raise Failed(f"{error}\n  its log: {log}")
    _check_origin(log, core)


def _check_origin(log: Path, core: Path) -> None:
    # `megatron` has no `__init__.py`, so modules that one folder lacks come from the next folder on the path.
    found = re.search(r"^Megatron Core \S+ of (.*)$", log.read_text("utf-8"), re.M)[1]
    if Path(found) != core:
        raise Failed(f"found Megatron Core in {found}, expected it in {core}")


def losses(folder: Path, core: Path, out: Path) -> dict[int, float]:
    """Let the Megatron-LM of a Megatron Core train from the release checkpoint, and return the losses.

    Raises:
        Failed: It doesn't train, or another Megatron Core was found.
    """
    import steps

    chats = steps.Chats(train=folder / "train.jsonl", valid=folder / "valid.jsonl", tokenizer=folder / "hf")
    flags = json.loads((folder / "flags.json").read_text("utf-8"))
    os.environ["PYTHONPATH"] = str(core)
    try:
        training = steps.train("train", out, chats, load=folder / "megatron", iterations=ITERATIONS, flags=flags)
    except steps.StepFailed as error:
        raise Failed(str(error)) from None
    _check_origin(training.log, core)
    return training.losses()


def reference(folder: Path) -> dict[int, float]:
    """Return the losses of the Megatron-LM of `REFERENCE`, which trains from the release checkpoint only once."""
    kept = folder / "reference.json"
    if not kept.is_file():
        found = losses(folder, unpacked(REFERENCE), folder / "runs" / "reference")
        kept.write_text(json.dumps(found), "utf-8")
    return {int(iteration): loss for iteration, loss in json.loads(kept.read_text("utf-8")).items()}


def trains(folder: Path, core: Path, out: Path) -> str:
    """Let a Megatron-LM train from the release checkpoint, and return its first and last loss.

    Raises:
        Failed: It doesn't train, the losses differ, or another Megatron Core was found.
    """
    wanted = reference(folder)
    found = losses(folder, core, out)
    if found.keys() != wanted.keys() or any(abs(found[each] - wanted[each]) > LOSS_TOLERANCE for each in wanted):
        raise Failed(f"the losses are {list(found.values())}, those of {REFERENCE} {list(wanted.values())}")
    return f"loss {found[1]:.3f} → {found[ITERATIONS]:.3f}"


def read(folder: Path, reader: str) -> bool:
    """Let a Megatron Core load the release checkpoint and train, and write the result into the page.

    Args:
        folder: what `make` has made.
        reader: a version in `CORES`, or the path of a checkout of Megatron-LM.
    """
    core = unpacked(reader) if reader in CORES else Path(reader).resolve()
    out = folder / "runs" / (reader if reader in CORES else f"checkout of {_commit(core)[:10]}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    done = []
    try:
        loads(folder, core, out)
        done.append("loads")
        if (core / "megatron" / "training").is_dir():
            done.append(trains(folder, core, out))
    except Failed as error:
        print(error, file=sys.stderr)
        done.append(f"fails: {str(error).splitlines()[0].replace(str(folder), '…')}")
    passed = not done[-1].startswith("fails")
    name = reader if reader in CORES else _name(core)
    print(f"megatron-core {name}: {'; '.join(done)}")
    _write(name, "; ".join(done))
    return passed


def _commit(checkout: Path) -> str:
    # A checkout that is not a repository may be inside another one.
    if not (checkout / ".git").exists():
        return "unknown"
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True).strip()


def _name(checkout: Path) -> str:
    facts = _package_info(checkout).read_text("utf-8")
    values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = '?(\w*)'?", facts, re.M))
    version = "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**values)
    commit = _commit(checkout)
    return f"{version} of a checkout, {PINS.get(commit, 'commit')} {commit[:10]}"


def _package_info(checkout: Path) -> Path:
    return checkout / "megatron" / "core" / "package_info.py"


def _write(reader: str, result: str) -> None:
    bridge, core = (metadata.version(package).partition("+")[0] for package in ("megatron-bridge", "megatron-core"))
    text, date = PAGE.read_text("utf-8"), datetime.now(UTC).date().isoformat()
    block = grid.with_result(page.block_of(text, BLOCK), reader, f"{bridge} ({core})", result, date)
    PAGE.write_text(page.with_block(text, BLOCK, block), "utf-8")


def main() -> None:
    """Make a release checkpoint, or let a Megatron Core read it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("make", "make the release checkpoint"), ("read", "let a Megatron Core read it")):
        command = commands.add_parser(name, help=does)
        command.add_argument("folder", type=Path, help="the folder of the release checkpoint")
    commands.choices["read"].add_argument("reader", help=f"one of {', '.join(CORES)}, or a checkout of Megatron-LM")
    given = parser.parse_args()
    reader = getattr(given, "reader", REFERENCE)
    if reader not in CORES and not _package_info(Path(reader)).is_file():
        parser.error(f"{reader} is neither one of {', '.join(CORES)} nor a checkout of Megatron-LM: pass one of them")
    os.environ.update(EMULATED, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if given.command == "make":
        make(given.folder)
    else:
        sys.exit(not read(given.folder.absolute(), given.reader))


if __name__ == "__main__":
    main()
