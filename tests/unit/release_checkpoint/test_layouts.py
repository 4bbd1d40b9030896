# SPDX-License-Identifier: Apache-2.0
"""The command with what people have who name `iter_0000000`: its path, a link, and the layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_states import Bridge, invoke

import megatron.bridge


VARIABLE = "MEGATRON_BRIDGE_CHECKPOINT_LAYOUT"


@pytest.fixture
def asked(build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Give what the command asks `import_ckpt` for; both layouts are written without a model."""
    options: dict[str, Any] = {}

    class Recorder(Bridge):
        def import_ckpt(self, hf_model: str, out: Path, **given: Any) -> None:
            options.update(given)
            build(out) if given["release"] else build(out, folder="iter_0000000", tracker="0", args=None)

    monkeypatch.setitem(vars(megatron.bridge), "AutoBridge", Recorder(build))
    monkeypatch.delenv(VARIABLE, raising=False)
    return options


@pytest.mark.parametrize(
    ("option", "variable", "release"),
    [
        (None, None, True),
        (None, "release", True),
        (None, "iter", False),
        ("iter", None, False),
        ("iter", "release", False),
        ("release", "iter", True),
    ],
)
def test_the_option_goes_before_the_variable(asked, tmp_path, monkeypatch, option, variable, release):
    if variable:
        monkeypatch.setenv(VARIABLE, variable)
    result = invoke("import", "model", tmp_path / "c", *(["--layout", option] if option else []))
    assert (result.exit_code, asked["release"]) == (0, release)
    assert ("Megatron-LM can't fine-tune from it" in result.stdout) is not release
    assert ("Megatron-LM starts from it with" in result.stdout) is release


def test_a_layout_that_nobody_knows_is_wrong_usage(asked, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    result = invoke("import", "model", tmp_path / "c")
    assert result.exit_code == 2 and VARIABLE in result.stderr and not asked


def test_the_link_is_asked_for_and_has_no_place_in_the_other_layout(asked, tmp_path):
    assert invoke("import", "model", tmp_path / "c", "--link-iter-0").exit_code == 0
    assert asked == {"release": True, "link_iter_0": True}
    asked.clear()
    result = invoke("import", "model", tmp_path / "d", "--link-iter-0", "--layout", "iter")
    assert result.exit_code == 2 and "found --layout iter. Drop one of the two." in result.stderr and not asked


def test_tensors_are_left_out_only_if_asked(asked, tmp_path):
    assert invoke("import", "model", tmp_path / "c").exit_code == 0 and "strict" not in asked
    assert invoke("import", "model", tmp_path / "d", "--no-strict").exit_code == 0 and asked["strict"] is False


def test_what_a_model_is_made_of_is_passed_on(asked, tmp_path):
    assert invoke("import", "model", tmp_path / "c", "--revision", "v2", "--adapter", "lora").exit_code == 0
    assert (asked["revision"], asked["adapter"]) == ("v2", Path("lora"))
    asked.clear()
    (tmp_path / "model").mkdir()
    result = invoke("import", "--from-megatron", tmp_path / "model", tmp_path / "d", "--dtype", "float32")
    assert result.exit_code == 2 and "--from-megatron copies the weights as they are; found --dtype" in result.stderr
    result = invoke("import", "--from-megatron", tmp_path / "model", tmp_path / "d")
    assert result.exit_code == 1 and "holds no checkpoint of Megatron-LM" in result.stderr and not asked


def test_iteration_0_is_not_overwritten_unasked(asked, build, tmp_path):
    root = build(tmp_path / "c", folder="iter_0000000", tracker="0", args=None)
    result = invoke("import", "model", root, "--layout", "iter")
    assert result.exit_code == 1 and not asked
    assert result.stderr == f"Error: {root} holds iter_0000000. Pass --overwrite to replace it, or a different path.\n"
    shutil.rmtree(root)


def test_a_path_that_is_not_there_is_the_release_beside_it(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c")
    given, release = root / "iter_0000000", root / "release"
    result = invoke("inspect", given, "--json")
    assert json.loads(result.stdout)["payload"]["folder"] == "release"
    note = f"Note: {given} does not exist. Using the release checkpoint beside it; pass {release} instead.\n"
    assert result.stderr == note
    assert "there is nothing at this path" in invoke("inspect", root / "iter_0000001").stdout.lower()


def test_the_command_and_the_library_ask_the_same_variable():
    from megatron.bridge.training.release_options import LAYOUT_VARIABLE

    assert LAYOUT_VARIABLE == VARIABLE


def test_what_a_killed_import_left_to_try_links_is_named_and_goes(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", core="0.18")
    (root / "iter_0000000.incomplete").symlink_to("release")
    found = json.loads(invoke("inspect", root, "--json").stdout)
    assert found["leftovers"] == ["iter_0000000.incomplete"] and found["problems"][0]["repairable"]
    assert invoke("repair", root).exit_code == 0
    assert not (root / "iter_0000000.incomplete").is_symlink() and (root / "release").is_dir()
