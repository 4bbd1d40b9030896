# SPDX-License-Identifier: Apache-2.0
"""Models of Transformer Engine's modules load what was written without it, and the check finds what they can't load.

`nox -s families` has every family. One process loads all releases here, for its start is what takes time.
"""

import os
import shutil
import sys
from pathlib import Path

import inert_extension
import load_families
import page
import pytest
import release_families
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from safetensors.torch import load_file, save_file

from megatron.bridge.training import checkpointing


# A dense model, and one with latent attention, dense layers before those with experts, and multi-token prediction.
FAMILIES = ("llama-3", "deepseek-v3-mtp")
CHANGED = "model.layers.1.mlp.down_proj.weight"
PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, load_families.Row]:
    """What came of two families, of a release that lacks keys, and of one whose source has another value."""
    if HAVE_TE or torch.cuda.is_available() or load_families.FOLDER_VARIABLE not in os.environ:
        pytest.skip(f"needs a host without GPU and the folder that nox names in {load_families.FOLDER_VARIABLE}")
    folder = tmp_path_factory.mktemp("releases")
    folders = [load_families.import_model(folder / family, family) for family in FAMILIES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "with_transformer_engine_keys", lambda state_dict: state_dict)
        folders.append(load_families.import_model(folder / "lacking", "qwen3-moe"))
    folders.append(shutil.copytree(folder / "llama-3", folder / "changed"))
    weights = folder / "changed" / "hf" / "model.safetensors"
    tensors = load_file(weights)
    tensors[CHANGED][3, 5] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    return {row.family: row for row in load_families.load(folders)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_loads_bit_for_bit_and_comes_back(rows: dict[str, load_families.Row], family: str) -> None:
    found = rows[family].found
    assert rows[family].problems == []
    layers = 4
    assert found["modules"] > 4 * layers and found["extra_states"] >= 4 * layers
    assert found["transformer_engine"] == "2.20.2"
    assert "transformer_engine" not in sys.modules


def test_keys_of_local_layers_are_all_that_a_release_has_besides(rows: dict[str, load_families.Row]) -> None:
    assert rows["llama-3"].found["besides"] == []
    besides = rows["deepseek-v3-mtp"].found["besides"]
    assert besides and all("norm" in key for key in besides), besides
    assert rows["deepseek-v3-mtp"].found["no_copies"] == []


def test_a_release_that_lacks_keys_is_seen(rows: dict[str, load_families.Row]) -> None:
    lacking = rows["lacking"].found["lacking"]
    assert any("pre_mlp_layernorm" in key for key in lacking), lacking
    assert any("_extra_state" in key for key in lacking), lacking
    assert rows["lacking"].problems[0].startswith(f"the release checkpoint lacks {len(lacking)} keys")


def test_one_value_that_differs_is_seen_on_both_ways(rows: dict[str, load_families.Row]) -> None:
    found = rows["changed"].found
    assert found["lost"] == [f"{CHANGED}: 1 of 8192 values differ"]
    assert len(found["unequal"]) == 1 and "linear_fc2.weight: 1 of 8192 values differ" in found["unequal"][0]
    assert len(rows["changed"].problems) == 2


def test_a_process_that_dies_fails_what_it_had_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load_families, "HERE", tmp_path)
    (tmp_path / "load_release.py").write_text("raise SystemExit(3)")
    (row,) = load_families.load([tmp_path / "llama-3"])
    assert (row.family, row.problems) == ("llama-3", ["the process ended with 3"])


def test_the_extension_has_every_name_and_refuses_every_call() -> None:
    extension = inert_extension.InertExtension("extension")
    kinds = extension.DType
    assert [int(kinds.kByte), int(kinds.kFloat32), int(kinds.kByte)] == [0, 1, 0]
    assert set(kinds.__members__) == {"kByte", "kFloat32"} and isinstance(kinds.kByte, kinds)
    assert extension.DType is kinds and extension.NVTE_QKV_Layout is not kinds
    with pytest.raises(NotImplementedError, match="rmsnorm_fwd is compiled"):
        extension.rmsnorm_fwd(1, eps=2)


def test_it_is_too_late_once_megatron_core_is_imported() -> None:
    with pytest.raises(RuntimeError, match="found megatron.core imported"):
        inert_extension.install()


def test_the_page_has_a_row_for_each_family() -> None:
    block = page.block_of(PAGE.read_text("utf-8"), load_families.BLOCK)
    named = [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("|")][2:]
    assert named == list(release_families.FAMILIES)
