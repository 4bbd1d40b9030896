# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM judges `megatron-bridge repair`: it doesn't start from what people have on disk, and then it does."""

import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import steps
import torch
from click.testing import CliRunner
from reference import Tensors, differences

from megatron.bridge import AutoBridge
from megatron.bridge.cli import main
from megatron.bridge.release_checkpoint.examine import examine
from megatron.bridge.release_checkpoint.verdicts import verdicts
from megatron.bridge.repair.problems import problems
from megatron.bridge.repair.state import _load_state
from megatron.bridge.training.mlm_compat.checkpoints import read_megatron_lm_args


COMMAND = Path(sys.executable).with_name("megatron-bridge")


def run(*arguments: str | Path) -> str:
    """Run the command as a user does."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=steps.environment())
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def run_here(*arguments: str | Path, code: int = 0) -> str:
    """Run the command in this process, which has imported Bridge."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (done.exit_code, done.stderr) == (code, ""), done.output
    return done.stdout


@pytest.fixture(scope="module")
def imported(workplace: Path, llama: Path) -> Path:
    """Import with the command."""
    printed = run("import", llama, workplace / "repair" / "imported")
    assert "--use-checkpoint-args" in printed
    return workplace / "repair" / "imported"


@pytest.fixture(scope="module")
def fresh(workplace: Path, imported: Path, chats: steps.Chats) -> steps.Training:
    """Train an idle iteration from the import."""
    flags = [*steps.model_flags(imported), "--lr=0"]
    return steps.train("from an import", workplace / "fresh", chats, load=imported, iterations=1, flags=flags)


@pytest.fixture(scope="module")
def upstream_s(workplace: Path, llama: Path) -> Path:
    """Write what import_ckpt writes without this change."""
    AutoBridge.import_ckpt(llama, workplace / "repair" / "upstream", release=False)
    return workplace / "repair" / "upstream"


def _mend_tracker(root: Path) -> None:
    (root / steps.TRACKER).write_text("release")


def _mend_folder(root: Path) -> None:
    (root / "iter_0000000").rename(root / "release")


def _mend_both(root: Path) -> None:
    _mend_tracker(root)
    _mend_folder(root)


def _forget_tracker(root: Path) -> None:
    _mend_folder(root)
    (root / steps.TRACKER).unlink()


def _use_common_pt(root: Path) -> None:
    """Keep the common state as core 0.18 and before do."""
    payload = examine(root).payload
    torch.save(_load_state(payload), payload.path / "common.pt")


NOT_STARTED = "AssertionError: either num-layers or encoder-num-layers should be specified"


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ((), NOT_STARTED),
        ((_mend_tracker,), "FileNotFoundError"),
        ((_mend_both,), NOT_STARTED),
        ((_use_common_pt,), NOT_STARTED),
    ],
    ids=["upstream's", "tracker mended", "tracker and folder mended", "upstream's with common.pt"],
)
def test_megatron_lm_trains_after_repair_and_not_before(
    state: tuple[Callable[[Path], None], ...],
    error: str,
    upstream_s: Path,
    imported: Path,
    fresh: steps.Training,
    chats: steps.Chats,
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(upstream_s, root)
    for change in state:
        change(root)
    flags = [*steps.model_flags(imported), "--lr=0"]
    with pytest.raises(steps.StepFailed, match=error):
        steps.train("before the repair", tmp_path / "before", chats, load=root, iterations=1, flags=flags)
    assert "Repair it with: megatron-bridge repair" in run_here("inspect", root, code=1)
    run_here("repair", root)
    assert "No problems found" in run_here("inspect", root)
    after = steps.train("after the repair", tmp_path / "after", chats, load=root, iterations=1, flags=flags)
    assert after.losses() == fresh.losses()
    saved = dict(steps.model_tensors(after.checkpoint / "iter_0000001"))
    assert differences(dict(steps.model_tensors(imported / "release")), saved) == []


@pytest.mark.parametrize(
    ("change", "source"),
    [(_mend_folder, "run_config.yaml"), (_forget_tracker, "Hugging Face"), (_use_common_pt, "run_config.yaml")],
)
def test_args_are_those_of_an_import(
    change: Callable[[Path], None], source: str, upstream_s: Path, imported: Path, llama: Path, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(upstream_s, root)
    change(root)
    if source == "Hugging Face":
        next(root.glob("*/run_config.yaml")).unlink()
        run_here("repair", root, "--hf-model", llama)
    else:
        run_here("repair", root)
    assert vars(read_megatron_lm_args(root)) == vars(read_megatron_lm_args(imported))
    states = [_load_state(examine(path).payload) for path in (root, imported)]
    for state in states:
        assert isinstance(state.pop("args"), Namespace)
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 128, "head_dim": 32}, "hidden_size is 128 by the args and 64 in the weights"),
        ({"num_hidden_layers": 2}, "num_layers is 2 by the args and 4 in the weights"),
        ({"intermediate_size": 256}, "ffn_hidden_size is 256 by the args and 128 in the weights"),
        ({"num_key_value_heads": 4}, "rows of linear_qkv is 192 by the args and 128 in the weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_hugging_face_model_is_refused(
    changes: dict[str, int], said: str, upstream_s: Path, workplace: Path, tmp_path: Path
) -> None:
    other = models.make_model(workplace / "repair" / next(iter(changes)), **changes)
    root = tmp_path / "checkpoint"
    shutil.copytree(upstream_s, root)
    done = CliRunner().invoke(main, ["repair", str(root), "--hf-model", str(other)])
    assert done.exit_code == 1
    assert f"is no checkpoint of {other}, {said}: pass the model that was imported" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in root.iterdir()) == sorted(path.name for path in upstream_s.iterdir())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_args_of_an_import_fit_its_weights(family: str, tmp_path: Path) -> None:
    hf = models.make_model(tmp_path / "hf", family)
    AutoBridge.import_ckpt(hf, tmp_path / "out")
    assert problems(examine(tmp_path / "out")) == []


def _forget_heads(state: dict) -> None:
    del state["args"].num_attention_heads


def _forget_version(state: dict) -> None:
    del state["checkpoint_version"]


@pytest.mark.parametrize(
    ("change", "error"),
    [(_forget_heads, "no attribute 'num_attention_heads'"), (_forget_version, "no attribute 'model_parallel_size'")],
)
def test_megatron_lm_stops_where_inspect_says_so_whatever_the_flags(
    change: Callable[[dict], None], error: str, imported: Path, chats: steps.Chats, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(imported, root)
    payload = examine(root).payload
    state = _load_state(payload)
    change(state)
    torch.save(state, payload.path / "common.pt")
    assert [each.loads for each in verdicts(examine(root))[:3]] == ["no"] * 3
    flags = steps.model_flags(imported, use_checkpoint_args=False)
    with pytest.raises(steps.StepFailed, match=error):
        steps.train("with flags", tmp_path / "trained", chats, load=root, iterations=1, flags=flags)


def test_command_exports_what_it_repaired(upstream_s: Path, llama: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(upstream_s, root)
    assert "Done." in run("repair", root)
    run("export", root, tmp_path / "hf", "--hf-model", llama)
    assert differences(Tensors(llama), Tensors(tmp_path / "hf")) == []
