# SPDX-License-Identifier: Apache-2.0
"""What an import and an export give back is read like the source: by transformers 5, and by the one of Bridge 0.3."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch

from megatron.bridge import AutoBridge


FAMILIES = ("llama-3.1", "qwen2")
PUBLISHED = [f"{family}-published" for family in FAMILIES]
SAVED = [f"{family}-saved" for family in FAMILIES]
TRANSFORMERS_4 = os.environ.get("TRANSFORMERS_4_PYTHON")
TOKENIZER = ("tokens", "text", "chat", "eos")
READER = Path(__file__).with_name("read_model.py")

needs_transformers_4 = pytest.mark.skipif(not TRANSFORMERS_4, reason="nox makes the environment with transformers 4")


@pytest.fixture(scope="module")
def folders(workplace: Path) -> dict[str, dict[str, Path]]:
    """Make each source as models are published and as transformers 5 saves it, then import and export it."""
    found = {}
    for family in FAMILIES:
        for spelling in ("published", "saved"):
            place = workplace / "model-files" / f"{family}-{spelling}"
            source = models.make_model(place / "source", family, dtype=torch.bfloat16)
            if spelling == "published":
                models.as_published(source)
            AutoBridge.import_ckpt(source, place / "out")
            AutoBridge.from_hf_pretrained(source).export_ckpt(place / "out", place / "export", show_progress=False)
            tokenizer = place / "out" / "release" / "tokenizer"
            found[place.name] = {"source": source, "export": place / "export", "tokenizer": tokenizer}
    return found


def read(python: str, folders: dict[str, dict[str, Path]], names: list[str]) -> dict[str, dict[str, Any]]:
    """Return what the transformers of an environment reads in each folder of each model."""
    paths = {(name, kind): str(path) for name in names for kind, path in folders[name].items()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, str(READER), *paths.values()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.splitlines()[-1])
    return {name: {kind: read[paths[name, kind]] for kind in folders[name]} for name in names}


@pytest.fixture(scope="module")
def by_transformers_5(folders: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    return read(sys.executable, folders, [*PUBLISHED, *SAVED])


@pytest.fixture(scope="module")
def by_transformers_4(folders: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    return read(TRANSFORMERS_4, folders, PUBLISHED)


@pytest.mark.parametrize("name", [*PUBLISHED, *SAVED])
def test_every_file_beside_the_weights_comes_back(folders: dict[str, dict[str, Path]], name: str) -> None:
    source, export = (
        {path.name: path.read_bytes() for path in folders[name][kind].iterdir() if path.suffix != ".safetensors"}
        for kind in ("source", "export")
    )
    assert source == export


def assert_read_alike(read: dict[str, dict[str, Any]]) -> None:
    """Compare an export with its source, and the tokenizer that is in the release with the source's."""
    assert read["export"] == read["source"]
    assert read["tokenizer"] == {what: read["source"][what] for what in TOKENIZER}


@pytest.mark.parametrize("name", [*PUBLISHED, *SAVED])
def test_transformers_5_reads_an_export_like_the_source(by_transformers_5: dict[str, Any], name: str) -> None:
    assert_read_alike(by_transformers_5[name])


@needs_transformers_4
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_4_reads_an_export_like_the_source(by_transformers_4: dict[str, Any], name: str) -> None:
    assert_read_alike(by_transformers_4[name])


@needs_transformers_4
@pytest.mark.parametrize("name", PUBLISHED)
def test_both_read_an_export_alike(
    by_transformers_4: dict[str, Any], by_transformers_5: dict[str, Any], name: str
) -> None:
    four, five = (read[name]["export"] for read in (by_transformers_4, by_transformers_5))
    assert {what: four[what] for what in TOKENIZER} == {what: five[what] for what in TOKENIZER}
    assert four["logits"] == pytest.approx(five["logits"], abs=1e-5)
