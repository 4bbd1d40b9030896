# SPDX-License-Identifier: Apache-2.0
"""The quickstart goes all the way, and answers wrong input with an error in one line."""

import re
import sys
from pathlib import Path

import models
import pytest
import steps


def quickstart(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(steps.HERE / "quickstart.py"), *map(str, arguments)]


def test_whole_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = steps.Step("quickstart", quickstart("--out", out), tmp_path / "log.txt")
    step.run()
    shown = step.log.read_text()
    losses = [float(loss) for loss in re.findall(r"^iteration +\d+  loss (\S+)$", shown, re.M)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 2
    assert f"loading release distributed checkpoint from {out / 'megatron'}" in shown
    assert re.search(r"loss on held-out conversations: Megatron-LM (\S+), transformers", shown)
    assert steps.payloads(out / "megatron") == ["iter_0000010", "iter_0000020", "release"]


def foreign_folder(folder: Path) -> list[str | Path]:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").touch()
    return ["--out", folder / "mine"]


def file_as_folder(folder: Path) -> list[str | Path]:
    (folder / "out").touch()
    return ["--out", folder / "out"]


def unknown_model(folder: Path) -> list[str | Path]:
    return ["--out", folder / "out", "--hf-model", folder / "nowhere"]


def no_template(folder: Path) -> list[str | Path]:
    (models.make_model(folder / "hf") / "chat_template.jinja").unlink()
    return ["--out", folder / "out", "--hf-model", folder / "hf"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (foreign_folder, "holds thesis.txt, which no quickstart made; pass an empty or new folder with --out"),
        (file_as_folder, "is a file; pass a folder with --out"),
        (unknown_model, "is not a folder here, and can't be downloaded from the hub"),
        (no_template, "has no chat template"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_line_says_what_is_wrong(tmp_path: Path, prepare, expected: str) -> None:
    step = steps.Step("quickstart", quickstart(*prepare(tmp_path)), tmp_path / "log" / "log.txt")
    with pytest.raises(steps.StepFailed):
        step.run()
    last = step.log.read_text().rstrip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
