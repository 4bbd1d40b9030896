# SPDX-License-Identifier: Apache-2.0
"""The command with a model on the hub, in and out: killed half-way and run again, and what is refused."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from checkpoints import AutoBridge, digest, names, run, save_hf_model
from small_hub import SmallHub, commit_of
from transformers import AutoModelForCausalLM


COMMAND = Path(sys.executable).with_name("megatron-bridge")
# What lies beside a model on the hub, and isn't needed.
BESIDE = {"pytorch_model.bin": b"another set", "original/consolidated.00.pth": b"a third", "picture.png": b"a picture"}


def make(folder: Path) -> None:
    save_hf_model(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    (folder / "hf/model.safetensors").unlink()
    model.save_pretrained(folder / "hf", max_shard_size="150KB")
    AutoBridge.import_ckpt(folder / "hf", folder / "release")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in several files, and its release."""
    folder = tmp_path_factory.mktemp("made")
    assert "error" not in run(partial(make, folder))
    return folder


@pytest.fixture
def hub(tmp_path):
    with SmallHub(tmp_path / "home") as hub:
        hub.token = "secret"
        yield hub


def start(hub: SmallHub, *arguments: str | Path, **variables: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([COMMAND, *arguments], env=hub.environment | variables, **pipes)


def finish(hub: SmallHub, *arguments: str | Path, **variables: str) -> tuple[int, str, str]:
    process = start(hub, *arguments, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_when_silent(hub: SmallHub, process: subprocess.Popen) -> None:
    assert hub.silent.wait(300)
    process.kill()
    process.communicate()
    hub.go_on.set()


def test_an_import_that_is_killed_while_it_downloads_goes_on(made, hub, tmp_path):
    hub.add("me/m", made / "hf", "v2")
    hub.repositories["me/m"]["v2"] |= BESIDE
    shards = {path.name: path.stat().st_size for path in made.glob("hf/*.safetensors")}
    largest = max(shards.values())
    assert len(shards) > 2
    # The hub falls silent in the largest file.
    hub.cut = largest - 1
    arguments = ("import", "me/m", tmp_path / "out", "--revision=v2", f"--cache-dir={tmp_path / 'cache'}", "--quiet")
    kill_when_silent(hub, start(hub, *arguments, HF_TOKEN="secret"))
    assert not (tmp_path / "out").exists()
    assert finish(hub, *arguments, "--token=secret") == (0, "", "")
    snapshot = tmp_path / "cache/models--me--m/snapshots" / commit_of("v2")
    assert names(snapshot) == {path.name for path in made.glob("hf/*")}
    assert not {file for file, _ in hub.asked} & BESIDE.keys() and not (tmp_path / "home/hub").exists()
    assert run(partial(digest, tmp_path / "out")) == run(partial(digest, made / "release"))


def gate(handler) -> bool:
    handler.refuse(403, "GatedRepo")
    return False


# name: (arguments, environment, whether the hub is gated, part of the line)
REFUSED = {
    "no such model": (["me/other", "--token=secret"], {}, False, "a model on the hub that you have access to"),
    "no token": (["me/m"], {}, False, "pass a token (--token, HF_TOKEN)"),
    "a gated model": (["me/m", "--token=secret"], {}, True, "me/m is gated: accept its terms on the hub"),
    "no such revision": (["me/m", "--token=secret", "--revision=v9"], {}, False, "me/m has no revision v9"),
    "no hub": (["me/m"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, False, "the hub can't be reached"),
    "offline": (["me/m"], {"HF_HUB_OFFLINE": "1"}, False, "the hub can't be reached"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(made, hub, tmp_path, name):
    arguments, variables, gated, line = REFUSED[name]
    hub.add("me/m", made / "hf")
    if gated:
        hub.server.RequestHandlerClass.allowed = gate
    code, out, err = finish(hub, "import", *arguments, tmp_path / "out", **variables)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("Error: ") and line in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.two_processes
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_export_that_is_killed_while_it_uploads_goes_on(made, hub, tmp_path, processes):
    arguments = ("export", made / "release", tmp_path / "hf", "--push-to-hub=me/tuned", "--private", "--token=secret")
    arguments = (*arguments, f"--processes={processes}", "--hf-model", made / "hf")
    hub.stop_after = 1
    process = start(hub, *arguments)
    assert hub.silent.wait(300)
    process.terminate()
    # The rank that uploads waits for the hub, which lets no handler run.
    hub.go_on.set()
    process.communicate(timeout=300)
    sent, hub.stop_after = list(hub.sent), None
    assert len(sent) == 1 and not hub.repositories["me/tuned"]["main"]
    exported = load_files(tmp_path / "hf")
    code, out, err = finish(hub, *arguments)
    assert code == 1 and "exists, expected no such path" in err, err
    code, out, err = finish(hub, *arguments, "--overwrite")
    assert code == 0 and out.endswith(f"Uploaded it to {hub.url}/me/tuned.\n"), err
    assert hub.sent.count(sent[0]) == 1 and hub.private == {"me/tuned"}
    files = hub.repositories["me/tuned"]["main"]
    assert files.keys() == names(tmp_path / "hf") | {"README.md"}
    assert {name: files[name] for name in exported} == exported
    assert exported == load_files(tmp_path / "hf")


def load_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.two_processes
def test_an_export_that_may_not_be_uploaded_stays(made, hub, tmp_path):
    arguments = ("export", made / "release", tmp_path / "hf", "--push-to-hub=me/tuned", "--token=another")
    code, out, err = finish(hub, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and "(--token, HF_TOKEN). The export is whole" in err, err
    assert load_files(tmp_path / "hf").keys() == load_files(made / "hf").keys()
