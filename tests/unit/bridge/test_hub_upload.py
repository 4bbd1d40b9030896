# SPDX-License-Identifier: Apache-2.0
"""An export is uploaded with a card of its own, and what was stored once isn't sent again."""

import os
import subprocess
import sys

import pytest
from small_hub import SmallHub

from megatron.bridge.utils.hub_upload import model_card


CODE = """\
import sys
from pathlib import Path
from megatron.bridge.utils.hub_upload import model_card, upload
print(upload(Path(sys.argv[1]), sys.argv[2], True, model_card("some/base", "/checkpoints/run", 7, False)))
"""


@pytest.fixture
def hub(tmp_path):
    with SmallHub(tmp_path / "home", HF_TOKEN="secret") as hub:
        yield hub


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "README.md"):
        (folder / name).write_text("of the source")
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(os.urandom(1 << 20))
    return folder


def start(hub, export, **variables):
    command, pipe = [sys.executable, "-c", CODE, str(export), "me/tuned"], subprocess.PIPE
    return subprocess.Popen(command, env=hub.environment | variables, stdout=pipe, stderr=pipe, text=True)


def test_an_export_is_uploaded_with_a_card_of_its_own(hub, export):
    hub.token = "secret"
    out, err = start(hub, export).communicate(timeout=120)
    assert out.strip() == f"{hub.url}/me/tuned", err
    files = hub.repositories["me/tuned"]["main"]
    assert files.keys() == {path.name for path in export.iterdir()} and hub.private == {"me/tuned"}
    for path in export.glob("model-*"):
        assert files[path.name] == path.read_bytes()
    card = files["README.md"].decode()
    assert 'base_model: "some/base"' in card and "This model was trained from [some/base]" in card
    assert "for 7 iterations" in card and "`run`" in card


def test_an_upload_that_is_killed_goes_on(hub, export):
    hub.stop_after = 1
    process = start(hub, export)
    assert hub.silent.wait(60)
    process.kill()
    process.communicate()
    hub.stop_after = None
    hub.go_on.set()
    sent = list(hub.stored)
    assert len(sent) == 1 and not hub.repositories["me/tuned"]["main"]
    out, err = start(hub, export).communicate(timeout=120)
    assert out.strip(), err
    assert list(hub.stored)[:1] == sent and hub.sent.count(sent[0]) == 1
    assert len(hub.repositories["me/tuned"]["main"]) == 4


def test_a_token_that_may_not_write_is_told_in_one_line(hub, export):
    hub.token = "another"
    _, err = start(hub, export).communicate(timeout=120)
    said = err.strip().splitlines()[-1]
    assert "(--token, HF_TOKEN)" in said and "local folder" not in said
    assert said.endswith(f". The export is whole at {export}; upload it with: hf upload me/tuned {export}")


def test_the_card_of_a_model_in_a_folder_has_no_address(tmp_path):
    card = model_card(str(tmp_path), str(tmp_path / "out"), 0, True)
    assert "base_model" not in card and f"This adapter was converted from {tmp_path.name} with" in card
