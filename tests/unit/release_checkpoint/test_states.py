# SPDX-License-Identifier: Apache-2.0
"""Every state in which checkpoints are found: what `inspect` says of it, and what `repair` makes of it."""

import errno
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result

import megatron.bridge
from megatron.bridge.cli import main
from megatron.bridge.models.hf_pretrained.export_staging import exports_whole
from megatron.bridge.release_checkpoint.examine import Checkpoint, examine
from megatron.bridge.release_checkpoint.files import HOST, Staging
from megatron.bridge.release_checkpoint.metadata import read_metadata
from megatron.bridge.release_checkpoint.state import differences
from megatron.bridge.release_checkpoint.verdicts import grouped, verdicts
from megatron.bridge.repair import repair
from megatron.bridge.repair import state as repair_state
from megatron.bridge.repair import steps as repair_steps
from megatron.bridge.repair.problems import problems
from megatron.bridge.repair.repair import Refused


TRACKER = "latest_checkpointed_iteration.txt"
KILLED = f"release.incomplete.{HOST}-1-01234567"
ENTRY_ALONE = {"common_pt": False}
BEFORE = {
    "folder": "iter_0000000",
    "tracker": "0",
    "args": None,
    "train_state": True,
    "bridge_tracker": True,
    **ENTRY_ALONE,
}
OLD = {"core": "0.18"}
PARTIAL_ARGS = {"num_layers": 2, "hidden_size": 8, "tensor_model_parallel_size": 1, "own": "kept"}
OTHERS_ARGS = {"num_layers": 77, "hidden_size": 9, "padded_vocab_size": 999, "own": "kept"}
TRAINING = {"folder": "iter_0000005", "tracker": "5", "iteration": 5, "optimizer": True, **ENTRY_ALONE}


@dataclass(frozen=True)
class State:
    """A state of a checkpoint.

    Attributes:
        name: What it is.
        made: Arguments of `build`.
        loads: Who loads it: Megatron-LM with core 0.12 to 0.15, 0.16 to 0.18, 0.19, and Bridge; y(es), p(artly), n(o).
        wrong: Parts of what is wrong.
        repaired: Whether repair makes a release of it; else the beginning of why not.
        change: What is done to it then.
        beside: What a repair leaves beside the release.
        needs_model: It takes the Hugging Face model to repair it.
    """

    name: str
    loads: str
    made: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    repaired: bool | str = True
    change: Callable[[Path], Any] = lambda root: None
    beside: tuple[str, ...] = ()
    needs_model: bool = False

    def make(self, build: Callable, root: Path) -> Path:
        build(root, **self.made)
        self.change(root)
        return root


def shell(command: str) -> Callable[[Path], Any]:
    """What a person types in the checkpoint root."""
    return lambda root: subprocess.run(command, shell=True, check=True, cwd=root)


def damage_entry(root: Path) -> None:
    """Overwrite the bytes of the entry; the weights stay."""
    shards = read_metadata(root / "release" / ".metadata").shards
    shard = next(shard for shard in shards if shard.entry.startswith("common_state"))
    with (root / "release" / shard.file).open("r+b") as file:
        file.seek(shard.offset)
        file.write(bytes(shard.length))


MOVED = "The weights lie in iter_0000000 and not in release"
NO_ARGS = "The common state has no Megatron-LM args"
NOT_THERE = "The tracker names {}, which is not there"
LAYOUT = "This is Bridge's layout of iteration 0 (--layout iter)"
NO_COMMON_PT = "There is no common.pt: Megatron-LM up to core 0.18 looks for it"
DIFFER = "common.pt and the entry common_state differ in "
TORN = "common.pt: the file is not what torch.save writes"
LINK = "iter_0000000 is a link to {}"
BRIDGES = "latest_train_state.pt exists"
NOT_WHOLE = "is incomplete, iter_0000000 is complete"

STATES = [
    State("release", "yyyy"),
    State("release without common.pt", "nnyy", ENTRY_ALONE, (NO_COMMON_PT,)),
    State("release of core 0.18", "yyyy", OLD),
    State("Bridge 0.6's", "nnny", BEFORE, (LAYOUT, NO_ARGS)),
    State("Bridge 0.6's of core 0.18", "nnny", BEFORE | OLD, (LAYOUT, NO_ARGS)),
    State("tracker mended", "nnnn", BEFORE | {"tracker": "release"}, (NOT_THERE.format("release"), MOVED, NO_ARGS)),
    State("folder mended", "nnnn", BEFORE | {"folder": "release"}, (NOT_THERE.format("iter_0000000"), NO_ARGS)),
    State("tracker and folder mended", "nnpy", {"args": None} | ENTRY_ALONE, (NO_ARGS, NO_COMMON_PT)),
    State("the same of core 0.18", "nppy", {"args": None} | OLD, (NO_ARGS,)),
    State("args alone mended", "nnny", BEFORE | {"args": {**PARTIAL_ARGS}}, (LAYOUT, "The args lack ffn_hidden_size")),
    State("some args", "nnny", {"args": PARTIAL_ARGS}, ("The args lack ffn_hidden_size",)),
    State("some args of core 0.18", "nnny", {"args": PARTIAL_ARGS} | OLD, ("The args lack ffn_hidden_size",)),
    State(
        "args without a size", "pppy", {"without_args": ("ffn_hidden_size",)} | OLD, ("The args lack ffn_hidden_size",)
    ),
    State(
        "args without parallelism",
        "nyyy",
        {"without_args": ("tensor_model_parallel_size", "pipeline_model_parallel_size")} | OLD,
        ("The args lack tensor_model_parallel_size",),
    ),
    State(
        "args of another model",
        "nnny",
        {"other_args": OTHERS_ARGS} | OLD,
        tuple(f"The args are those of another model: {name}" for name in ("padded_vocab", "hidden", "num_layers")),
    ),
    State("no tracker", "nnny", {"tracker": None}, ("No tracker",)),
    State("no tracker, Bridge 0.6's", "nnny", BEFORE | {"tracker": None}, ("No tracker", MOVED, NO_ARGS, BRIDGES)),
    State("tracker of no meaning", "nnnn", {"tracker": "relase"}, ("The tracker holds 'relase'",)),
    State("Bridge's tracker left", "yyyy", {"bridge_tracker": True}, (BRIDGES,)),
    State("train state in the release", "yyyy", {"train_state": True}, ("release/train_state.pt",)),
    State("old checkpoint_version", "nnny", {"common": {"checkpoint_version": 0}}, ("checkpoint_version is 0.0",)),
    State("version 2", "nnny", {"common": {"checkpoint_version": 2.0}} | OLD, ("checkpoint_version is 2.0",)),
    State(
        "old checkpoint_version without args",
        "nppy",
        {"args": None, "common": {"checkpoint_version": 0}},
        (NO_ARGS, "checkpoint_version is 0.0"),
    ),
    State("no iteration", "pppy", {"without": "iteration"} | OLD, ("The common state has no iteration",)),
    State(
        "neither args nor iteration",
        "nppy",
        {"args": None, "without": "iteration"} | OLD,
        (NO_ARGS, "The common state has no iteration"),
    ),
    State("random state of a training", "yyyy", {"common": {"rng_state": [1]}}, ("A repair would write",)),
    State("killed import over a release", "yyyy", {"leftovers": (KILLED,)}, (f"{KILLED} was",)),
    State(
        "killed between two renames",
        "nnnn",
        {"folder": f"{KILLED}/release.replaced", "tracker": None, "leftovers": (KILLED,)},
        ("No tracker", f"{KILLED} was", "The weights lie in release.replaced"),
    ),
    State(
        "killed between two renames, by an older Bridge",
        "nnnn",
        {"folder": "release.replaced", "tracker": None, "leftovers": (KILLED,)},
        ("No tracker", f"{KILLED} was", "release.replaced was", "The weights lie in release.replaced"),
    ),
    State(
        "empty release",
        "nnny",
        BEFORE,
        (f"release {NOT_WHOLE}", LAYOUT, NO_ARGS),
        change=shell("mkdir release"),
    ),
    State(
        "copied by hand",
        "nnny",
        BEFORE,
        (f"release {NOT_WHOLE}", LAYOUT, NO_ARGS),
        change=shell("mkdir release && cp -r iter_0000000/* release/"),
        beside=("release.damaged",),
    ),
    State(
        "copied by hand, tracker mended",
        "nnnn",
        BEFORE,
        (".metadata is missing", f"release {NOT_WHOLE}"),
        change=shell("mkdir release && cp -r iter_0000000/* release/ && printf release > " + TRACKER),
        beside=("release.damaged",),
    ),
    State(
        "copied by hand, and other files added",
        "nnnn",
        BEFORE,
        (".metadata is missing", "release is whole but for .metadata, which lies in iter_0000000"),
        change=shell(
            f"mkdir release && cp -r iter_0000000/* release/ && touch release/x && printf release > {TRACKER}"
        ),
        beside=("iter_0000000",),
    ),
    State(
        "moved by hand",
        "nnnn",
        BEFORE,
        ("metadata.json is missing", "release is whole but for .metadata, which lies in iter_0000000"),
        change=shell("mkdir release && mv iter_0000000/* release/ && rm release/train_state.pt"),
    ),
    State(
        "moved by hand, tracker mended",
        "nnnn",
        BEFORE | OLD,
        (".metadata is missing", "release is whole but for .metadata"),
        change=shell(f"mkdir release && mv iter_0000000/* release/ && printf release > {TRACKER}"),
    ),
    State("empty iteration", "yyyy", {}, ("A repair would remove iter_0000000",), change=shell("mkdir iter_0000000")),
    State(
        "release is a link to nothing",
        "nnny",
        BEFORE,
        (f"release {NOT_WHOLE}", LAYOUT),
        change=shell("ln -s gone release"),
        beside=("release.damaged",),
    ),
    State(
        "release is a file",
        "nnny",
        BEFORE,
        (f"release {NOT_WHOLE}", LAYOUT),
        change=shell("touch release && mkdir release.damaged"),
        beside=("release.damaged", "release.damaged.1"),
    ),
    State(
        "links for leftovers",
        "yyyy",
        {},
        ("latest_checkpointed_iteration.txt.incomplete was left",),
        change=shell(f"ln -s gone {TRACKER}.incomplete && ln -s gone release.incomplete"),
        beside=("release.incomplete",),
    ),
    State(
        "folders that nobody is known to have left",
        "yyyy",
        change=shell(
            f"mkdir release.incomplete release.replaced {KILLED} && touch {KILLED}/mine release.replaced/mine"
        ),
        beside=("release.incomplete", "release.replaced", KILLED),
    ),
    State(
        "damaged, beside a whole iteration 0 of another import",
        "nnnn",
        BEFORE | {"tracker": "release"},
        ("metadata.json is no JSON object", ".metadata is missing"),
        "release: metadata.json is no JSON object",
        change=shell("mkdir release && touch release/metadata.json release/__9_0.distcp"),
    ),
    State(
        "iteration 0 beside an older release",
        "nnny",
        BEFORE,
        (LAYOUT, NO_ARGS),
        "holds an older release beside iter_0000000, which its tracker names, and both are complete: move away",
        change=shell("cp -r iter_0000000 release"),
    ),
    State("training", "nnyy", TRAINING, (), "holds training iteration 5"),
    State("training of core 0.18", "yyyy", TRAINING | OLD, (), "holds training iteration 5"),
    State(
        "training without tracker", "nnny", TRAINING | {"tracker": None}, ("No tracker",), "holds training iteration 5"
    ),
    State(
        "training made a release by hand",
        "nnyy",
        TRAINING | {"folder": "release", "tracker": "release"},
        (),
        "holds training iteration 5",
    ),
    State("optimizer state at iteration 0", "yyyy", {"optimizer": True}, (), "holds optimizer state"),
    State("no run config", "yyyp", {"run_config": False}),
    State(
        "neither args nor run config",
        "nppp",
        {"args": None, "run_config": False},
        (NO_ARGS,),
        "has neither args nor",
        needs_model=True,
    ),
    State(
        "args of another model, and no run config",
        "nnnp",
        {"other_args": OTHERS_ARGS, "run_config": False},
        ("The args are those of another model",),
        "has neither args that fit its weights (padded_vocab_size is 999",
        needs_model=True,
    ),
    State(
        "empty", "nnnn", {"folder": None, "tracker": None}, ("The folder holds no checkpoint",), "holds no checkpoint"
    ),
    State(
        "tracker alone",
        "nnnn",
        {"folder": None},
        ("There is a tracker, or a leftover, but no weights",),
        "holds no checkpoint",
    ),
    State(
        "nothing but a killed import's",
        "nnnn",
        {"folder": None, "tracker": None, "leftovers": (KILLED,)},
        ("There is a tracker, or a leftover, but no weights",),
        "holds no checkpoint but what a killed import left",
    ),
    State("layout iter with args", "nnny", {"folder": "iter_0000000", "tracker": "0", "train_state": True}, (LAYOUT,)),
    # The two forms of the common state.
    State("args in common.pt alone", "yyyy", {"args": None, "in_common_pt": {}}, (f"{DIFFER}args;",)),
    State("args in the entry alone", "nppy", {"in_common_pt": {"args": None}}, (f"{DIFFER}args;", NO_ARGS)),
    State("args in Bridge 0.6's by hand", "nnny", BEFORE | {"in_common_pt": {}}, (LAYOUT, f"{DIFFER}args;")),
    State(
        "args alone in common.pt by hand",
        "yyyy",
        {"args": None, "in_common_pt": {"without": "content_metadata"}},
        (f"{DIFFER}args, content_metadata;",),
    ),
    State("some args by hand", "nnny", {"args": None, "in_common_pt": {"args": PARTIAL_ARGS}}, (DIFFER, "lack")),
    State(
        "common.pt of another model",
        "nnny",
        {"in_common_pt": {"other_args": OTHERS_ARGS}},
        (f"{DIFFER}args.hidden_size, args.num_layers, args.own and 1 more;", "The args are those of another model"),
    ),
    State("entry of another model", "yyyy", {"other_args": OTHERS_ARGS, "in_common_pt": {}}, (DIFFER,)),
    State(
        "versions that differ",
        "nnny",
        {"in_common_pt": {"common": {"checkpoint_version": 0}}},
        (f"{DIFFER}checkpoint_version;",),
    ),
    State(
        "forms that differ and fit",
        "yyyy",
        {"in_common_pt": {"other_args": {"max_position_embeddings": 64}, "common": {"content_metadata": {}}}},
        (f"{DIFFER}args.max_position_embeddings, content_metadata;",),
        "differ in args.max_position_embeddings, content_metadata, and the weights don't tell which is right: remove",
    ),
    State(
        "an entry of a training",
        "yyyy",
        {"iteration": 7, "in_common_pt": {}},
        (f"{DIFFER}iteration;",),
        "was trained up to iteration 7",
    ),
    State("common.pt empty", "nnnn", {}, (TORN,), change=shell("truncate -s 0 release/common.pt")),
    State("common.pt cut short", "nnnn", {}, (TORN,), change=shell("truncate -s 1000 release/common.pt")),
    State("common.pt no archive", "nnnn", {}, (TORN,), change=shell("echo nonsense > release/common.pt")),
    State(
        "common.pt no dict",
        "nnnn",
        {},
        ("common.pt: the common state is a list, expected a dict; the entry common_state is whole",),
        change=lambda root: torch.save([1], root / "release" / "common.pt"),
    ),
    State("common.pt a link to nothing", "nnyy", {}, (NO_COMMON_PT,), change=shell("ln -sf gone release/common.pt")),
    State("entry damaged", "yyyy", {}, ("(File is not a zip file); common.pt is whole",), change=damage_entry),
    State(
        "common.pt damaged, Bridge 0.6's",
        "nnnn",
        BEFORE,
        (TORN, LAYOUT, NO_ARGS),
        change=shell("touch iter_0000000/common.pt"),
    ),
    State("common.pt damaged of core 0.18", "nnnn", OLD, (TORN,), TORN, shell("truncate -s 0 release/common.pt")),
    State(
        "common.pt a folder",
        "nnnn",
        ENTRY_ALONE,
        ("common.pt can't be read (it is no file). Make it readable first.",),
        "common.pt can't be read (it is no file). Make it readable first.",
        change=shell("mkdir release/common.pt"),
    ),
    # Links.
    State("link to the release", "yyyy", beside=("iter_0000000",), change=shell("ln -s release iter_0000000")),
    State(
        "link to the release, and tracker 0",
        "nnny",
        {"tracker": "0"},
        ("The tracker says 0 and not release, which the link iter_0000000 leads to",),
        beside=("iter_0000000",),
        change=shell("ln -s release iter_0000000"),
    ),
    State(
        "link to the release of the wheel before, and no tracker",
        "nnny",
        {"tracker": None} | ENTRY_ALONE,
        ("No tracker", NO_COMMON_PT),
        beside=("iter_0000000",),
        change=shell("ln -s release iter_0000000"),
    ),
    State(
        "link, killed between two renames",
        "nnnn",
        {"folder": "release.replaced", "tracker": None},
        ("release.replaced was",),
        beside=("iter_0000000",),
        change=shell("ln -s release iter_0000000"),
    ),
    *(
        State(f"link to {what}", "yyyy", {}, (LINK.format(to),), LINK.format(to), shell(command))
        for what, to, command in (
            ("nothing", "gone", "ln -s gone iter_0000000"),
            ("another folder", "../c/other", "mkdir other && ln -s ../c/other iter_0000000"),
            ("its release by a whole path", "/", 'ln -s "$PWD/release" iter_0000000'),
        )
    ),
    State(
        "weights behind a link",
        "nnnn",
        BEFORE,
        (LINK.format("elsewhere"), "There is a tracker, or a leftover, but no weights"),
        LINK.format("elsewhere, expected one to release, or none: remove the link, or put what it leads to"),
        change=shell("mv iter_0000000 elsewhere && ln -s elsewhere iter_0000000"),
    ),
]
REPAIRED = [state for state in STATES if state.repaired is True]
REFUSED_STATES = ("Bridge 0.6's", "Bridge 0.6's of core 0.18", "copied by hand", "moved by hand")
names = {"ids": lambda state: state.name.replace(" ", "-")}


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch, release_args: Namespace) -> None:
    """Give what Bridge's provider would, which takes long to import."""
    monkeypatch.setattr(repair_state, "_derive_args", lambda payload, hf_model, trust: release_args)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def weights(payload: Path) -> dict[str, torch.Tensor]:
    """Reads the weights with PyTorch's own reader."""
    entries = dcp.FileSystemReader(payload).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "size")}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(payload), no_dist=True)
    return state


@pytest.mark.parametrize("state", STATES, **names)
def test_inspect(state: State, build: Callable, tmp_path: Path):
    root = state.make(build, tmp_path / "c")
    before = contents(root)
    found = examine(root)
    series = [state.loads[0]] * 4 + [state.loads[1]] * 3 + [*state.loads[2:]]
    assert [each.loads[0] for each in verdicts(found)] == series
    wrong = problems(found)
    for part in state.wrong:
        assert any(part in each.what for each in wrong), (part, wrong)
    assert bool(wrong) == bool(state.wrong), wrong
    # What inspect promises is what repair does.
    assert {each.repairable for each in wrong} == ({state.repaired is True or state.needs_model} if wrong else set())
    result = invoke("inspect", root, "--json")
    command = json.loads(result.stdout)["repair"]
    model = ["--hf-model", "MODEL"] if state.needs_model else []
    promised = wrong and (state.repaired is True or state.needs_model)
    assert command == (["megatron-bridge", "repair", str(root), *model] if promised else None)
    assert result.exit_code == (1 if wrong else 0)
    assert json.loads(result.stdout)["ok"] is not bool(wrong)
    assert invoke("inspect", root).exit_code == result.exit_code
    assert contents(root) == before


@pytest.mark.parametrize("state", REPAIRED, **names)
def test_repair_makes_a_release(state: State, build: Callable, tmp_path: Path, derived, expected):
    root = state.make(build, tmp_path / "c")
    before = contents(root)
    dry = invoke("repair", root, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert contents(root) == before
    result = invoke("repair", root)
    assert result.exit_code == 0, result.output
    assert [line for line in dry.output.splitlines() if line.startswith("  ") and "--load" not in line] == [
        line for line in result.output.splitlines() if line.startswith("  ") and "--load" not in line
    ]
    is_release(root, expected, state.beside)
    once = contents(root)
    again = invoke("repair", root)
    assert (again.exit_code, again.output) == (0, f"{root} is a release checkpoint. There is nothing to repair.\n")
    assert contents(root) == once
    assert invoke("inspect", root).exit_code == 0


@pytest.fixture
def expected(build: Callable, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of every checkpoint here."""
    return weights(build(tmp_path / "whole") / "release")


def is_release(root: Path, expected: dict[str, torch.Tensor], beside: tuple[str, ...] = ()) -> None:
    """Holds a root against what `import_ckpt` writes."""
    assert {path.name for path in root.iterdir()} == {TRACKER, "release", *beside}
    assert (root / TRACKER).read_text() == "release"
    assert not (root / "release" / "train_state.pt").exists()
    assert not list((root / "release").glob("*.incomplete"))
    payload = examine(root).payload
    assert payload.damage == [] and payload.missing_args == []
    assert (payload.version, payload.iteration) == (3.0, 0)
    assert payload.state["content_metadata"] == {"a": 1}
    assert payload.common == ("both" if payload.core == "0.19 or later" else "common.pt")
    assert payload.discord == [] and all(form.damage is None for form in payload.forms.values())
    found = weights(root / "release")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("state", [state for state in STATES if isinstance(state.repaired, str)], **names)
def test_repair_refuses(state: State, build: Callable, tmp_path: Path):
    root = state.make(build, tmp_path / "c")
    before = contents(root)
    result = invoke("repair", root)
    assert result.exit_code == 1
    assert state.repaired in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert contents(root) == before


def dies_at(number: int, root: Path) -> bool:
    """Repairs in a process of its own, which ends without a word at its n-th change; tells whether it came so far."""
    child = os.fork()
    if child == 0:
        changes = iter(range(1, 1000))

        def act(function: Callable, *arguments: Any) -> None:
            if next(changes) == number:
                if function is repair_steps.write_new:
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(77)
            function(*arguments)

        repair_steps.act = act
        try:
            repair.run(repair.plan(root))
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 77)
    return code == 77


def is_none_or_whole(root: Path, before: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """What the tracker names is whole, unless the tracker is as it was and named nothing whole before."""
    found = examine(root)
    useless = before.named not in before.folders or before.payload.damage
    if found.tracker is None or useless and found.tracker == before.tracker:
        return
    assert found.named in found.folders
    whole = weights(root / found.named)
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    assert found.payload.damage == []
    # All readers take the first form that is there: as it was, or what a release's says.
    first, was = (next(iter(each.payload.forms.values())) for each in (found, before))
    if None in (first.state, was.state) or differences(first.state, was.state):
        is_right = first.state is not None and not repair_state._state_fault(replace(found.payload, source=None))
        assert is_right or first.damage == was.damage is not None


@pytest.mark.parametrize("state", REPAIRED, **names)
def test_kill_at_each_step(state: State, build: Callable, tmp_path: Path, derived, expected, record_property):
    for number in range(1, 100):
        root = state.make(build, tmp_path / str(number))
        before = examine(root)
        killed = dies_at(number, root)
        if killed:
            is_none_or_whole(root, before, expected)
            repair.run(repair.plan(root))
        is_release(root, expected, state.beside)
        if not killed:
            break
    record_property("count of repairs killed, at each change in turn", number - 1)
    assert number > 1 or not state.wrong


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("state", [state for state in REPAIRED if state.name in REFUSED_STATES], **names)
def test_refused_by_the_system_at_each_step(
    state: State, error: int, build: Callable, tmp_path: Path, derived, expected, monkeypatch, record_property
):
    for number in range(1, 100):
        root = state.make(build, tmp_path / str(number))
        before = examine(root)
        changes = iter(range(1, 1000))

        def act(function: Callable, *arguments: Any) -> None:
            if next(changes) == number:  # noqa: B023 - called in this turn
                if function is repair_steps.write_new:
                    function(arguments[0], b"half")
                raise OSError(error, os.strerror(error), "a file")
            function(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(repair_steps, "act", act)
            result = invoke("repair", root)
        if result.exit_code == 0:
            break
        assert result.stderr.count("\n") == 1
        assert not [path for path in root.rglob("*.incomplete*") if path.name not in (KILLED, *state.beside)]
        assert result.stderr.startswith(f"Error: a file: {os.strerror(error)}. ")
        is_none_or_whole(root, before, expected)
        repair.run(repair.plan(root))
        is_release(root, expected, state.beside)
    record_property(f"count of repairs that met {errno.errorcode[error]}, at each change in turn", number - 1)
    assert number > 1 or not state.wrong


@pytest.mark.parametrize("core", ["0.18", "0.19"])
def test_repair_keeps_args_that_are_there(core: str, build: Callable, tmp_path: Path, derived):
    root = build(tmp_path / "c", args=PARTIAL_ARGS, core=core)
    repair.run(repair.plan(root))
    args = examine(root).payload.args
    assert (args.own, args.padded_vocab_size) == ("kept", 128)


def test_repair_that_fails_leaves_the_checkpoint_as_it_was(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def derive(*arguments: Any) -> Namespace:
        raise Refused("another model")

    monkeypatch.setattr(repair_state, "_derive_args", derive)
    root = build(tmp_path / "c", **BEFORE)
    before = sorted(root.rglob("*"))
    assert invoke("repair", root).stderr == "Error: another model\n"
    assert sorted(root.rglob("*")) == before


def test_repair_twice_leaves_no_file_that_nobody_reads(build: Callable, tmp_path: Path, derived):
    root = build(tmp_path / "c", **BEFORE)
    repair.run(repair.plan(root))
    torch.save({**torch.load(root / "release/common.pt"), "checkpoint_version": 0}, root / "release/common.pt")
    repair.run(repair.plan(root))
    files = {shard.file for shard in read_metadata(root / "release" / ".metadata").shards}
    assert files == {path.name for path in (root / "release").glob("*.distcp")}


READ_BY_OTHERS = """
import argparse, io, sys, torch, torch.distributed.checkpoint as dcp
entry = {"common_state/shard_0_1": io.BytesIO()}
dcp.load(entry, checkpoint_id=sys.argv[1], no_dist=True)
with torch.serialization.safe_globals([argparse.Namespace]):
    file = torch.load(sys.argv[1] + "/common.pt", weights_only=True)
(entry,) = torch.load(entry["common_state/shard_0_1"]) if isinstance(entry, io.BytesIO) else entry.popitem()[1]
print(file == entry, sorted(file), len(vars(file["args"])))
"""


@pytest.mark.parametrize("made", [{"args": None}, {}], ids=["args derived", "args there"])
def test_what_a_repair_writes_is_read_by_a_fresh_process(made: dict, build: Callable, tmp_path: Path, derived):
    root = build(tmp_path / "c", **made, **ENTRY_ALONE)
    repair.run(repair.plan(root))
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_BY_OTHERS, str(root / "release")],
        capture_output=True,
        text=True,
        env=environment,
    )
    keys = ["args", "checkpoint_version", "content_metadata", "iteration"]
    assert done.stdout == f"True {keys} 10\n", done.stderr


def test_values_that_are_not_plain_are_left_out_of_what_a_repair_writes(build: Callable, tmp_path: Path, expected):
    values = {"own": types.SimpleNamespace(a=1), "listed": [types.SimpleNamespace()], "params_dtype": torch.bfloat16}
    for number in range(1, 20):
        root = build(tmp_path / str(number), other_args=values, **ENTRY_ALONE)
        if killed := dies_at(number, root):
            repair.run(repair.plan(root))
        is_release(root, expected)
        args = torch.load(root / "release/common.pt")["args"]
        assert args.params_dtype == torch.bfloat16 and not {"own", "listed"} & vars(args).keys()
        if not killed:
            break
    assert number > 4


def test_objects_beside_the_args_are_refused(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", common={"content_metadata": types.SimpleNamespace()}, **ENTRY_ALONE)
    before = contents(root)
    assert "the common state holds objects, expected numbers, text, lists and dicts" in invoke("repair", root).stderr
    assert [each.repairable for each in problems(examine(root))] == [False]
    assert contents(root) == before


def test_repair_leaves_an_older_iteration_0_where_it_is(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", tracker="0")
    shutil.copytree(root / "release", root / "iter_0000000")
    repair.run(repair.plan(root))
    assert (root / TRACKER).read_text() == "release"
    assert (root / "iter_0000000").is_dir()


def test_running_import_is_left_alone(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", leftovers=(KILLED,))
    running = Staging(root / "release")
    running.open()
    expected = {"An import or a repair is running here: wait for it"}
    assert {each.what for each in problems(examine(root))} >= expected
    with pytest.raises(Refused, match="is running: wait for it"):
        repair.plan(root)
    running.close()
    assert repair.plan(root).steps


def test_a_plan_that_was_overtaken_is_refused(build: Callable, tmp_path: Path, derived, expected):
    root = build(tmp_path / "c", **BEFORE)
    first, second = repair.plan(root), repair.plan(root)
    repair.run(first)
    with pytest.raises(Refused, match="has changed since this repair looked at it: run the command again"):
        repair.run(second)
    is_release(root, expected)


def test_an_import_that_begins_after_the_plan_is_left_alone(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", **BEFORE)
    plan, running = repair.plan(root), Staging(root / "release")
    running.open()
    with pytest.raises(Refused, match="is running: wait for it"):
        repair.run(plan)
    running.close()
    assert (root / TRACKER).read_text() == "0"


def test_nothing_is_written_through_a_link(build: Callable, tmp_path: Path, derived, expected):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("kept")
    folder.mkdir()
    (folder / "file").write_text("kept")
    for core in ("0.18", "0.19"):
        root = build(tmp_path / core, **BEFORE, core=core)
        payload = root / "iter_0000000"
        for path in (root / TRACKER, payload / "common.pt", payload / ".metadata", payload / "__0_1.distcp"):
            path.with_name(f"{path.name}.incomplete").symlink_to(victim)
        (root / "release.incomplete").symlink_to(folder)
        (payload / "__0_1.distcp").symlink_to(victim)
        assert invoke("repair", root).exit_code == 0
        (root / "release" / "__0_1.distcp").unlink() if core == "0.18" else None
        is_release(root, expected, ("release.incomplete",))
        assert victim.read_text() == "kept" and (folder / "file").read_text() == "kept"


def test_integrity_manifest_goes_with_what_it_describes(build: Callable, tmp_path: Path, derived):
    root = build(tmp_path / "c", args=None)
    (root / "release" / "integrity.json").write_text("{}")
    repair.run(repair.plan(root))
    assert not (root / "release" / "integrity.json").exists()


def test_integrity_manifest_stays_where_a_file_is_added(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", **ENTRY_ALONE)
    (root / "release" / "integrity.json").write_text("{}")
    repair.run(repair.plan(root))
    assert (root / "release" / "common.pt").exists() and (root / "release" / "integrity.json").exists()


def test_integrity_manifest_stays_where_no_args_can_be_derived(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise repair.Refused("another model")

    monkeypatch.setattr(repair_state, "_derive_args", refuse)
    root = build(tmp_path / "c", args=None)
    (root / "release" / "integrity.json").write_text("{}")
    before = contents(root)
    with pytest.raises(repair.Refused):
        repair.run(repair.plan(root))
    assert contents(root) == before


# --- damage ----------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def _shorten(root: Path) -> None:
    (file,) = (root / "release").glob("*.distcp")
    os.truncate(file, 1000)


def _plant_in_metadata(root: Path) -> None:
    path = root / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Payload(root / "trace")
    path.write_bytes(pickle.dumps(metadata))


def _plant_in_common_pt(root: Path) -> None:
    torch.save({"args": Payload(root / "trace")}, root / "release" / "common.pt")


def _plant_in_entry(root: Path) -> None:
    payload = examine(root).payload
    data = io.BytesIO()
    torch.save([{"args": Payload(root / "trace")}], data)
    repair_state._replace_entry(payload, data.getvalue())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: next((root / "release").glob("*.distcp")).unlink(), ".distcp is missing"),
        (_shorten, "is short: 1,000 of"),
        (lambda root: (root / "release" / ".metadata").unlink(), ".metadata is missing"),
        (lambda root: (root / "release" / ".metadata").write_bytes(b"\x80\x04"), "cut off"),
        (lambda root: (root / "release" / "metadata.json").unlink(), "metadata.json is missing"),
        (lambda root: (root / "release" / "metadata.json").write_text("["), "metadata.json is no JSON object"),
        (_plant_in_metadata, "names posix.mkdir"),
        (_plant_in_common_pt, "names __builtin__.mkdir"),
        (_plant_in_entry, "names posix.mkdir"),
    ],
    ids=["missing", "short", "no .metadata", "cut", "no json", "json", "in .metadata", "in common.pt", "in entry"],
)
def test_damage_is_said_and_nothing_runs(damage: Callable, said: str, build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", bridge_tracker=True)
    damage(root)
    before = contents(root)
    if "posix" in said or "__builtin__" in said:
        said = "names posix.mkdir"
    result = invoke("inspect", root, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert any(said in each["what"] for each in document["problems"])
    assert {each["loads"] for each in document["readers"]} == {"no"}
    assert said in invoke("inspect", root).stdout.replace("\n", " ")
    result = invoke("repair", root)
    assert result.exit_code == 1
    assert said in result.stderr
    assert contents(root) == before
    assert not (root / "trace").exists()


# --- args and weights ------------------------------------------------------------------------------------------------


def test_repair_takes_derived_args_over_those_that_contradict_the_weights(build: Callable, tmp_path: Path, derived):
    root = build(tmp_path / "c", other_args=OTHERS_ARGS)
    repair.run(repair.plan(root))
    args = examine(root).payload.args
    assert (args.own, args.num_layers, args.hidden_size) == ("kept", 2, 8)


# --- series of Megatron-LM -------------------------------------------------------------------------------------------


def test_series_that_are_judged_alike_are_one_line(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", **ENTRY_ALONE)
    readers = [each.reader for each in grouped(verdicts(examine(root)))]
    assert readers == ["Megatron-LM, core 0.12 to 0.18", "Megatron-LM, core 0.19", "Megatron-Bridge"]
    assert "core 0.12 to 0.18" in " ".join(invoke("inspect", root).stdout.split())
    document = json.loads(invoke("inspect", root, "--json").stdout)
    cores = [f"Megatron-LM, core 0.{minor}" for minor in range(12, 20)]
    assert [each["reader"] for each in document["readers"]] == [*cores, "Megatron-Bridge"]


# --- command line ----------------------------------------------------------------------------------------------------


def test_inspect_takes_a_payload_folder(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c")
    document = json.loads(invoke("inspect", root / "release", "--json").stdout)
    assert document["path"] == str(root)
    assert document["payload"]["folder"] == "release"


def test_a_link_to_the_release_is_the_release(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c")
    (root / "iter_0000000").symlink_to("release")
    document = json.loads(invoke("inspect", root / "iter_0000000", "--json").stdout)
    assert document == json.loads(invoke("inspect", root / "release", "--json").stdout)
    assert (document["link"], document["folders"], document["layout"]) == ("release", ["release"], "release")
    assert "iter_0000000 (a link to release)" in invoke("inspect", root).stdout
    for folder in ("iter_0000000", "release"):
        said = f"Error: {root}/release is a payload folder, expected a root: pass {root}\n"
        assert invoke("repair", root / folder).stderr == said


def test_nothing_behind_a_link_to_another_folder_is_touched(build: Callable, tmp_path: Path, derived):
    other = build(tmp_path / "other", **BEFORE) / "iter_0000000"
    for tracker in ("0", "release", None):
        root = build(tmp_path / f"c{tracker}", tracker=tracker, train_state=True)
        (root / "iter_0000000").symlink_to(other)
        before = contents(other)
        said = f"iter_0000000 is a link to {other}, expected one to release, or none: remove the link, or put what it "
        assert any(each.what.startswith(said) and not each.repairable for each in problems(examine(root)))
        assert f"{root}/{said}" in invoke("repair", root).stderr
        assert contents(other) == before


@pytest.mark.parametrize(
    ("made", "layout", "common_state"),
    [
        ({}, "release", "both"),
        (OLD, "release", "common.pt"),
        (ENTRY_ALONE, "release", "entry"),
        (BEFORE, "iter", "entry"),
        (BEFORE | {"tracker": "release"}, None, "entry"),
        (TRAINING, "training", "entry"),
    ],
)
def test_json_says_layout_and_forms(
    made: dict, layout: str | None, common_state: str, build: Callable, tmp_path: Path
):
    document = json.loads(invoke("inspect", build(tmp_path / "c", **made), "--json").stdout)
    assert (document["layout"], document["payload"]["common_state"]) == (layout, common_state)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_inspect_of_what_is_no_checkpoint(kind: str, tmp_path: Path):
    if kind == "file":
        (tmp_path / "c").write_text("x")
    result = invoke("inspect", tmp_path / "c")
    assert result.exit_code == 1
    assert ("nothing at this path" if kind == "missing" else "This is a file") in result.stdout


def test_json_gives_the_flags(build: Callable, tmp_path: Path):
    document = json.loads(invoke("inspect", build(tmp_path / "c"), "--json").stdout)
    short = ["--load", str(tmp_path / "c"), "--use-checkpoint-args", "--norm-epsilon", "1e-05"]
    assert document["flags"]["use_checkpoint_args"] == short
    assert document["flags"]["without"][2:4] == ["--num-layers", "2"]
    assert document["payload"]["parameters"] == 128 * 8 + 2 * 16 * 8
    assert document["payload"]["parallelism"] == {"TP": 1, "PP": 1}


def test_hostile_names_do_not_reach_the_terminal(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c")
    path = root / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "\x1b]0;owned\x07[red]x"
    path.write_bytes(pickle.dumps(metadata))
    for command in ("inspect", "repair"):
        result = invoke(command, root)
        assert "\x1b" not in result.output.replace("\x1b[", "") and "\x07" not in result.output
        assert "[red]x" in result.output


def test_closed_pipe_is_no_error(build: Callable, tmp_path: Path):
    code = "from megatron.bridge.cli import main; main()"
    command = f"{sys.executable} -c '{code}' inspect {build(tmp_path / 'c')} --json | true"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


def test_wrong_usage_ends_with_2(tmp_path: Path):
    assert invoke("inspect").exit_code == 2
    assert invoke("repair", tmp_path, "--gone").exit_code == 2
    assert invoke("import", "a", tmp_path, "--dtype", "int8").exit_code == 2


def test_import_refuses_a_release_that_is_there(build: Callable, tmp_path: Path):
    result = invoke("import", "model", build(tmp_path / "c"))
    assert result.exit_code == 1
    said = "holds a release checkpoint. Pass --overwrite to replace it, or a different output path."
    assert result.stderr == f"Error: {tmp_path / 'c'} {said}\n"


def test_import_refuses_a_training_and_what_is_no_model(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", **TRAINING)
    for arguments in (("model", root), ("model", root, "--overwrite")):
        assert "holds training iteration 5" in invoke("import", *arguments).stderr
    for missing in (tmp_path / "gone", "./gone"):
        said = f"{missing} is not a folder; expected a Hugging Face model"
        assert said in invoke("import", missing, tmp_path / "new").stderr
    assert not (tmp_path / "new").exists()


class Bridge:
    """Stands for AutoBridge: it makes the noise that a real one makes, and does as it is told."""

    def __init__(self, convert: Callable[[Path], None]):
        self.convert = convert

    def __call__(self, *arguments: Any, **options: Any) -> "Bridge":
        return self

    from_hf_pretrained = __call__

    def import_ckpt(self, hf_model: str, out: Path, **options: Any) -> None:
        print("noise")
        print("noise", file=sys.stderr)
        os.write(1, b"noise")
        os.write(2, b"noise")
        warnings.warn("noise", stacklevel=2)
        logging.getLogger("noise").warning("noise")
        logging.getLogger("megatron.bridge.utils.fusions").warning("noise")
        for _ in range(2):
            logging.getLogger("megatron.bridge.models.conversion.hf_checkpoint").warning("%s\nhas NaN", "norm\x1b[2J")
        logging.getLogger("megatron.bridge.training.release_checkpoint").warning("could not be removed")
        self.convert(Path(out))

    hf_pretrained = SimpleNamespace()

    @exports_whole
    def export_ckpt(self, out: Path, hf_out: Path, **options: Any) -> None:
        self.import_ckpt("", hf_out)


WARNINGS = ["norm?[2J has NaN", "could not be removed"]


def test_import_prints_what_it_is_asked_for_and_warnings_of_ours(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setitem(vars(megatron.bridge), "AutoBridge", Bridge(build))
    for more in (["--json"], []):
        out = tmp_path / f"c{len(more)}"
        main(["import", "model", str(out), *more], standalone_mode=False)
        printed = capfd.readouterr()
        assert printed.err.splitlines() == [f"Warning: {warning}" for warning in WARNINGS]
        assert "noise" not in printed.out
        if more:
            document = json.loads(printed.out)
            assert document["flags"]["use_checkpoint_args"][:2] == ["--load", str(out)]
            assert document["warnings"] == WARNINGS
        else:
            assert printed.out.startswith(f"Wrote {out}: a release checkpoint, 1,280 parameters")


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, RuntimeError("of the bridge\nin two lines")])
def test_export_that_ends_early_leaves_nothing(
    interrupted: BaseException, build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text("half")
        raise interrupted

    monkeypatch.setitem(vars(megatron.bridge), "AutoBridge", Bridge(convert))
    root = build(tmp_path / "c")
    result = invoke("export", root, tmp_path / "hf", "--hf-model", "model")
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    if interrupted is not KeyboardInterrupt:
        *warned, error = result.stderr.splitlines()
        assert error == "Error: RuntimeError: of the bridge in two lines. Pass --verbose to see where it happened."
        assert warned == [f"Warning: {warning}" for warning in WARNINGS]


def test_export_refuses_a_folder_that_is_there(build: Callable, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    result = invoke("export", build(tmp_path / "c"), tmp_path / "hf")
    assert result.exit_code == 1
    said = "exists, expected no such path, or an empty folder: pass a different path, or --overwrite (overwrite=True)"
    assert result.stderr == f"Error: {tmp_path / 'hf'} {said}\n"


def test_error_is_one_line_and_verbose_has_the_traceback(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c", iteration=5)
    code = "from megatron.bridge.cli import main; main()"
    for more in ([], ["--verbose"]):
        command = [sys.executable, "-c", code, "repair", str(root), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert "holds training iteration 5" in done.stderr
        assert ("Traceback" in done.stderr) == bool(more)
        assert more or done.stderr.count("\n") == 1


def test_inspect_loads_neither_torch_nor_bridge(build: Callable, tmp_path: Path):
    root = build(tmp_path / "c")
    code = (
        "import sys\nfrom megatron.bridge.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print([n for n in ('torch', 'numpy', 'transformers', 'megatron.core') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
