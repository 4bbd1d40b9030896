# SPDX-License-Identifier: Apache-2.0
"""Of a model on the hub one set of weights is downloaded, and what was interrupted goes on."""

import json
import os
import subprocess
import sys
import time

import pytest
from small_hub import SmallHub, commit_of


@pytest.fixture
def hub(tmp_path):
    with SmallHub(tmp_path / "home") as hub:
        yield hub


CODE = """
import json, sys
from megatron.bridge.utils.hub import download
for arguments in json.loads(sys.argv[1]):
    try:
        print(download(*arguments))
    except (OSError, ValueError) as error:
        print(error)
"""


def start(hub, *downloads, **variables):
    command, pipe = [sys.executable, "-c", CODE, json.dumps(downloads)], subprocess.PIPE
    return subprocess.Popen(command, env=hub.environment | variables, stdout=pipe, stderr=pipe, text=True)


def lines(hub, *downloads, **variables):
    """Give what is said of each download: the folder, or the error."""
    out, err = start(hub, *downloads, **variables).communicate(timeout=120)
    assert out.count("\n") == len(downloads), err
    return out.splitlines()


def names(folder):
    return {each for _, _, files in os.walk(folder) for each in files}


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


BESIDE = {"config_dot_json": "{}", "tokenizer_dot_json": "[]", "LICENSE": "free", "README_dot_md": "a model"}
OWN = {"config.json", "tokenizer.json", "LICENSE", "README.md"}


def test_one_set_of_weights_is_downloaded_at_a_revision(hub, tmp_path):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    shards = {"model.safetensors.index.json": index, "model-1.safetensors": "1", "model-2.safetensors": "2"}
    others = {"consolidated.safetensors": "3", "pytorch_model.bin": "4", "original__x.pth": "5", "picture.png": "6"}
    model = write(tmp_path / "model", **BESIDE, **shards, **others)
    hub.add("me/m", model, "main")
    write(model, config_dot_json="{ }")
    hub.add("me/m", model, "v2")
    hub.add("me/old", write(tmp_path / "old", **BESIDE, **{"pytorch_model.bin": "1", "tf_model.h5": "2"}))
    first, second, old = lines(hub, ["me/m"], ["me/m", "v2"], ["me/old"])
    assert names(first) == names(second) == OWN | shards.keys()
    assert [os.path.basename(each) for each in (first, second)] == [commit_of("main"), commit_of("v2")]
    assert names(old) == OWN | {"pytorch_model.bin"}
    # What two revisions share is in the cache.
    asked = [file for file, _ in hub.asked]
    assert asked.count("config.json") == 3 and asked.count("model-1.safetensors") == 1


def test_a_download_that_is_killed_keeps_its_files(hub, tmp_path):
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": os.urandom(12 << 20)}
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config_dot_json": "{}", "model.safetensors.index.json": index, **shards}
    hub.add("me/m", write(tmp_path / "model", **files))
    snapshot = tmp_path / "home/hub/models--me--m/snapshots" / commit_of("main")
    hub.cut = 11 << 20
    process = start(hub, ["me/m"])
    assert hub.silent.wait(60)
    while not (snapshot / "model-1.safetensors").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    hub.go_on.set()
    hub.asked.clear()
    (folder,) = lines(hub, ["me/m"])
    assert "model-1.safetensors" not in {file for file, _ in hub.asked}
    assert (snapshot / "model-2.safetensors").read_bytes() == shards["model-2.safetensors"] and folder == str(snapshot)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, tmp_path):
    data = os.urandom(25 << 20)
    hub.add("me/m", write(tmp_path / "model", **{"config_dot_json": "{}", "model.safetensors": data}))
    hub.cut = 21 << 20
    hub.go_on.set()
    (folder,) = lines(hub, ["me/m"])
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        assert file.read() == data
    assert [first for file, first in hub.asked if file == "model.safetensors"] == [0, 20 << 20]


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_what_was_downloaded_is_there_without_network(hub, tmp_path, variables):
    model = write(tmp_path / "model", **BESIDE, **{"model.safetensors": "1"})
    for revision in ("main", "v2"):
        hub.add("me/m", model, revision)
    asked = (["me/m"], ["me/m", "v2"], ["me/m", commit_of("main")])
    assert lines(hub, *asked) == lines(hub, *asked, **variables)


def test_what_cannot_be_downloaded_is_told_in_one_line(hub, tmp_path):
    hub.add("me/m", write(tmp_path / "model", config_dot_json="{}"))
    hub.token = "secret"
    said = lines(hub, ["me/m", None, "secret"], ["me/m", "v9", "secret"], ["me/other", None, "secret"], ["me/m"])
    expected = [
        "me/m has no weights on the hub",
        "me/m has no revision v9: pass a branch, a tag, or a commit of it",
        "me/other is neither a local folder nor a model on the hub",
        "pass a token (--token, HF_TOKEN)",
    ]
    assert all(part in line for part, line in zip(expected, said, strict=True)), said
    (said,) = lines(hub, ["not a name"])
    assert "not a name is neither a local folder nor a model on the hub" in said
    (said,) = lines(hub, ["me/n"], HF_HUB_OFFLINE="1")
    assert "me/n is not in the hub's cache, and the hub can't be reached" in said
